//! Compiles `proto/` with protox, so that a build needs no `protoc` on the machine.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors =
        protox::compile(["base/v1/watch.proto", "base/v1/data.proto", "base/v1/tenancy.proto"], ["proto"])?;

    let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
    // Served by gRPC reflection.
    let encoded = prost::Message::encode_to_vec(&descriptors);
    std::fs::write(out_dir.join("descriptors.bin"), encoded)?;

    // The gateway finds the JSON form of a message by its name.
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
