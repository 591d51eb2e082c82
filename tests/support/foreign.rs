//! Programs in other languages. Their packages are installed once and kept in `target/` for the next run.

use std::path::{Path, PathBuf};
use tokio::process::Command;
use tokio::sync::Mutex;

/// One installation at a time.
static INSTALLING: Mutex<()> = Mutex::const_new(());

/// A directory of this repository.
pub(crate) fn directory(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A Python with the requirements of the program in this directory.
pub(crate) async fn python(program: &Path) -> PathBuf {
    let _alone = INSTALLING.lock().await;
    let requirements = program.join("requirements.txt");
    let name = program.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_str().unwrap().replace('/', "-");
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let (python, done) = (directory.join("bin/python"), directory.join("requirements.txt"));
    let wanted = std::fs::read(&requirements).unwrap();
    if std::fs::read(&done).is_ok_and(|installed| installed == wanted) {
        return python;
    }
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory)).await;
    run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement"]).arg(&requirements)).await;
    // Last, so that an interrupted installation is repeated.
    std::fs::copy(&requirements, &done).unwrap();
    python
}

/// The value for `NODE_PATH`: the packages of the program in this directory, as its lock file pins them.
pub(crate) async fn node_modules(program: &Path) -> String {
    let _alone = INSTALLING.lock().await;
    let installed = run(Command::new(directory("tests/clients/node/install")).arg(program)).await;
    String::from_utf8(installed).unwrap().trim().to_owned()
}

/// Runs a command and returns its output. May take as long as the network does.
async fn run(command: &mut Command) -> Vec<u8> {
    let output = command.kill_on_drop(true).output().await.unwrap_or_else(|error| {
        panic!("{command:?}: {error}. This test needs Python 3.9 or newer with venv and pip, Node.js 18 or newer with npm (./requirements test installs them), and their registries")
    });
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
