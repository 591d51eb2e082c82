//! `docker/Dockerfile`.

use super::{Environment, path, read};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use tuplewatch::config::Config;

pub(super) struct Image {
    /// Name and arguments, in order.
    instructions: Vec<(String, String)>,
}

impl Image {
    pub(super) fn read() -> Self {
        let text = read("docker/Dockerfile");
        let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
        let text = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
        let instruction = |line: &str| {
            let (name, rest) = line.split_once(' ').unwrap();
            (name.to_owned(), rest.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        Self { instructions: text.lines().map(instruction).collect() }
    }

    /// The arguments of each instruction of this name.
    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.instructions.iter().filter(move |(given, _)| given == name).map(|(_, rest)| rest.as_str())
    }

    fn last<'a>(&'a self, name: &'a str) -> &'a str {
        self.all(name).last().unwrap_or_else(|| panic!("no {name}"))
    }

    /// An instruction in exec form, because the image has no shell.
    fn exec_form(&self, name: &str) -> Vec<String> {
        let rest = self.last(name);
        let list = rest.find('[').map(|at| &rest[at..]).unwrap_or_else(|| panic!("{name} {rest} takes a shell"));
        serde_json::from_str(list).unwrap()
    }

    /// The default arguments of the program.
    pub(super) fn arguments(&self) -> Vec<String> {
        self.exec_form("CMD")
    }

    /// The arguments of the program in the health check.
    pub(super) fn healthcheck(&self) -> Vec<String> {
        let command = self.exec_form("HEALTHCHECK");
        assert_eq!(command[0], self.program());
        command[1..].to_vec()
    }

    fn program(&self) -> String {
        let entrypoint = self.exec_form("ENTRYPOINT");
        assert_eq!(entrypoint.len(), 1);
        entrypoint[0].clone()
    }

    /// The environment of the image that runs. The one that builds has its own.
    pub(super) fn environment(&self) -> Environment {
        let last_stage = self.instructions.iter().rposition(|(name, _)| name == "FROM").unwrap();
        let last_stage = self.instructions[last_stage..].iter();
        let variables = last_stage.filter(|(name, _)| name == "ENV").flat_map(|(_, rest)| rest.split(' '));
        variables.map(|pair| pair.split_once('=').unwrap()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect()
    }

    pub(super) fn ports(&self) -> BTreeSet<u16> {
        self.last("EXPOSE").split(' ').map(|port| port.parse().unwrap()).collect()
    }

    pub(super) fn volume(&self) -> &str {
        self.last("VOLUME")
    }

    /// Without SIG.
    pub(super) fn stop_signal(&self) -> &str {
        self.last("STOPSIGNAL").strip_prefix("SIG").unwrap()
    }
}

#[test]
fn the_image_matches_its_files() {
    let image = Image::read();
    let [built, ran] = image.all("FROM").collect::<Vec<_>>()[..] else { panic!("two stages") };
    let manifest = read("Cargo.toml");
    let version = manifest.lines().find_map(|line| line.strip_prefix("rust-version = ")).unwrap().trim_matches('"');
    assert!(built.starts_with(&format!("rust:{version}-")), "Cargo.toml says {version}, the image is {built}");
    assert!(ran == "scratch" && !image.last("USER").starts_with("0"), "{ran}");
    assert!(image.all("COPY").any(|rest| rest == "--from=build /image /"));
    assert!(image.all("RUN").any(|rest| rest.contains("cargo build --release --locked")));

    let environment = image.environment();
    assert!(environment["TUPLEWATCH_CHANGELOG__PATH"].starts_with(&format!("{}/", image.volume())));
    // COPY does not change the owner of existing files.
    let owned = format!(" /volume {}", image.volume());
    assert!(image.all("COPY").any(|rest| rest.contains("--chown=65532:65532") && rest.ends_with(&owned)));
    assert!(image.all("RUN").all(|rest| !rest.contains(&format!("/image{}", image.volume()))));
    let config = Config::load(None, environment, &[]).unwrap_or_else(|error| panic!("{error}"));
    let ports = [config.server.grpc.port, config.server.http.unwrap().port];
    assert_eq!(image.ports(), BTreeSet::from(ports));
    assert_eq!(image.arguments(), ["serve"]);
}

/// Collects the files of the image as the Dockerfile does, and runs the program with these libraries only.
#[test]
fn the_image_has_every_library_that_the_program_needs() {
    let image = Image::read();
    let root = tempfile::tempdir().unwrap();
    let program = format!("{}{}", root.path().display(), image.program());
    std::fs::create_dir_all(Path::new(&program).parent().unwrap()).unwrap();
    std::fs::copy(env!("CARGO_BIN_EXE_tuplewatch"), &program).unwrap();
    let collect = image.last("RUN").replace("/image", root.path().to_str().unwrap());
    let shell = image.exec_form("SHELL");
    let collected = Command::new(&shell[0]).args(&shell[1..]).arg(&collect).output().unwrap();
    assert!(collected.status.success(), "{collect}: {}", String::from_utf8_lossy(&collected.stderr));

    let mut libraries = BTreeSet::new();
    find(root.path(), "libc.so.6", &mut libraries);
    let [library] = libraries.iter().collect::<Vec<_>>()[..] else { panic!("one C library: {libraries:?}") };
    let mut loaders = BTreeSet::new();
    find(root.path(), "ld-linux-x86-64.so.2", &mut loaders);
    let loader = loaders.first().expect("a loader");
    let ran = Command::new(loader)
        .args(["--inhibit-cache", "--library-path"])
        .arg(library.parent().unwrap())
        .args([&program, "--version"])
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    for name in ["etc/nsswitch.conf", "etc/ssl/certs/ca-certificates.crt"] {
        assert!(root.path().join(name).metadata().unwrap().len() > 0, "{name}");
    }
}

fn find(directory: &Path, name: &str, found: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find(&path, name, found);
        } else if path.file_name().is_some_and(|file| file == name) {
            found.insert(path);
        }
    }
}

/// Cargo accepts the copied files as a complete project, and every included file is among them.
#[test]
fn the_copied_files_are_enough_to_build() {
    let image = Image::read();
    let copied: BTreeSet<&str> = image
        .all("COPY")
        .filter(|rest| !rest.starts_with("--from"))
        .flat_map(|rest| rest.rsplit_once(' ').unwrap().0.split(' '))
        .collect();
    let ignored = read(".dockerignore");
    let kept: BTreeSet<&str> = ignored.lines().filter_map(|line| line.strip_prefix('!')).collect();
    assert_eq!(copied, kept, "Dockerfile and .dockerignore");

    let context = tempfile::tempdir().unwrap();
    for name in &copied {
        let status = Command::new("cp").arg("-r").arg(path(name)).arg(context.path()).status().unwrap();
        assert!(status.success(), "{name}");
    }
    let manifest = context.path().join("Cargo.toml");
    let cargo = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked", "--manifest-path"])
        .arg(&manifest)
        .output()
        .unwrap();
    assert!(cargo.status.success(), "{}", String::from_utf8_lossy(&cargo.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&cargo.stdout).unwrap();
    let targets: Vec<&str> = metadata["packages"][0]["targets"].as_array().unwrap().iter().map(source).collect();
    assert!(targets.iter().any(|source| source.ends_with("src/main.rs")), "{targets:?}");
    includes_exist(&context.path().join("src"));
}

fn source(target: &serde_json::Value) -> &str {
    target["src_path"].as_str().unwrap()
}

fn includes_exist(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            includes_exist(&path);
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        // Tests include more, and are not built there.
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        for include in ["include!(\"", "include_str!(\"", "include_bytes!(\""] {
            for included in text.split(include).skip(1).filter_map(|rest| rest.split('"').next()) {
                let included = path.parent().unwrap().join(included);
                assert!(included.is_file(), "{} includes {}", path.display(), included.display());
            }
        }
    }
}
