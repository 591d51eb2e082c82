//! `src/api/grpc/proto/` is generated from `proto/` and kept in the repository: a build then needs neither a compiler for protobuf
//! nor a generator of code, with all that these depend on.
//!
//! `just generate` writes the files, and this test fails where they are not what it would write. Run it after a change of `proto/`
//! and before the change of the code that uses it: this test is built with the program.

#![expect(clippy::unwrap_used, reason = "a test fails where it expected something")]

use std::fs;
use std::path::Path;

/// With this variable the files are written instead of compared.
const WRITE: &str = "TUPLEWATCH_GENERATE";

/// What is imported comes along.
const SOURCES: [&str; 3] = ["base/v1/watch.proto", "base/v1/data.proto", "base/v1/tenancy.proto"];

/// Names and contents of the files.
fn generate() -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(SOURCES, [root.join("proto")]).unwrap();
    let mut files = vec![("descriptors.bin".to_owned(), prost::Message::encode_to_vec(&descriptors))];

    let directory = tempfile::tempdir().unwrap();
    let mut config = tonic_prost_build::Config::new();
    // The gateway finds the JSON form of a message by its name.
    config.enable_type_names();
    let builder = tonic_prost_build::configure().out_dir(directory.path()).emit_rerun_if_changed(false);
    builder.compile_fds_with_config(descriptors, config).unwrap();
    files.extend(contents(directory.path()));
    files.sort();
    files
}

fn contents(directory: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn generated_code_is_up_to_date() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api/grpc/proto");
    let generated = generate();
    if std::env::var_os(WRITE).is_some() {
        for (name, content) in &generated {
            fs::write(directory.join(name), content).unwrap();
        }
    }
    let kept = contents(&directory);
    let names = |files: &[(String, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&kept), names(&generated), "src/api/grpc/proto/ has other files than are generated");
    for ((name, kept), (_, generated)) in kept.iter().zip(&generated) {
        // Not printed: thousands of lines.
        assert!(
            kept == generated,
            "src/api/grpc/proto/{name} is not what proto/ says: run `just generate` ({WRITE}=1 cargo test --test generated)"
        );
    }
}
