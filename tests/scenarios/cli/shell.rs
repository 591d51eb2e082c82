//! Shell completions and help.

use super::process::{Ran, run, tuplewatch};
use std::path::Path;
use tokio::process::Command;

const SUBCOMMANDS: [&str; 10] =
    ["serve", "setup", "doctor", "teardown", "dev", "watch", "health", "token", "config", "completions"];

/// Runs a script in a bash with our completions, without any user configuration.
async fn bash(completions: &Path, script: &str) -> Ran {
    let mut bash = Command::new("bash");
    bash.args(["--norc", "--noprofile", "-euc", script, "bash"]).arg(completions).kill_on_drop(true);
    run(bash).await
}

#[tokio::test]
async fn bash_completes_the_command_line() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("tuplewatch.bash");
    std::fs::write(&script, tuplewatch(&["completions", "bash"]).await.succeeded()).unwrap();
    std::fs::write(directory.path().join("relations.yaml"), "").unwrap();
    assert_eq!(bash(&script, "bash -n \"$1\"").await.succeeded(), "");

    let file = format!("{}/rela", directory.path().display());
    let whole_file = format!("{}/relations.yaml", directory.path().display());
    for (words, offered) in [
        (&["ser"][..], "serve"),
        (&["set"], "setup"),
        (&["serve", "--server-grpc-p"], "--server-grpc-port"),
        (&["watch", "--out"], "--output"),
        (&["watch", "--output", "j"], "json"),
        (&["serve", "--config", &file], &whole_file),
        (&["completions", "zs"], "zsh"),
    ] {
        let (last, before) = words.split_last().unwrap();
        let line = [&["tuplewatch"], words].concat().join(" ");
        let complete = format!(
            "source \"$1\"; COMP_WORDS=({line}); COMP_CWORD={}; _tuplewatch tuplewatch '{last}' '{}' || true; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            words.len(),
            before.last().unwrap_or(&"tuplewatch")
        );
        let reply = bash(&script, &complete).await.succeeded();
        assert!(reply.lines().any(|reply| reply == offered), "'{line}' is completed with {reply:?}, not {offered}");
    }
}

#[tokio::test]
async fn other_shells_have_completion_scripts() {
    for (shell, starts) in [("zsh", "#compdef tuplewatch"), ("fish", "#"), ("elvish", ""), ("powershell", "")] {
        let script = tuplewatch(&["completions", shell]).await.succeeded();
        assert!(script.starts_with(starts), "{shell}");
        for subcommand in SUBCOMMANDS {
            assert!(script.contains(subcommand), "{shell} has no {subcommand}");
        }
    }
    tuplewatch(&["completions", "dos"]).await.misused(&["invalid value 'dos'", "bash"]);
}

#[tokio::test]
async fn help_has_a_short_and_a_long_form() {
    let root = tuplewatch(&["--help"]).await.succeeded();
    for subcommand in SUBCOMMANDS {
        assert!(root.contains(&format!("\n  {subcommand} ")), "{subcommand} is not listed");
        let short = tuplewatch(&[subcommand, "-h"]).await.succeeded();
        let whole = tuplewatch(&[subcommand, "--help"]).await.succeeded();
        for help in [&short, &whole] {
            assert!(help.contains("\nExamples:\n  tuplewatch "), "{subcommand}: {help}");
        }
        // The short help leaves out the flags of the configuration keys.
        assert!(!short.contains("--changelog-memory-window"), "{short}");
        let configures = whole.contains("-c, --config <FILE>");
        assert_eq!(whole.contains("--changelog-memory-window"), configures, "{whole}");
        assert!(short.lines().count() < 40, "{short}");
    }
}
