//! The examples that `--help` shows for each subcommand. A test parses every line.

pub(super) const ALL: &str = "\
Examples:
  tuplewatch dev                             # a private PostgreSQL and a server, to try it
  tuplewatch watch --tenant t1               # prints changes as they are committed
  tuplewatch setup --database-uri postgres://owner@db/app
  tuplewatch serve --database-uri postgres://tuplewatch@db/app";

pub(super) const SERVE: &str = "\
Examples:
  tuplewatch serve --database-uri postgres://tuplewatch@db/app
  tuplewatch serve --config tuplewatch.yaml --logger-format json
  tuplewatch serve --config tuplewatch.yaml --reset-log    # if the change log cannot be read";

pub(super) const SETUP: &str = "\
Examples:
  tuplewatch setup --dry-run --database-uri postgres://owner@db/app
  tuplewatch setup --database-uri postgres://owner@db/app
  tuplewatch setup --config tuplewatch.yaml --recreate-slot    # after the slot was lost";

pub(super) const DOCTOR: &str = "\
Examples:
  tuplewatch doctor --config tuplewatch.yaml
  tuplewatch doctor --json | jq -r '.diagnostics[] | select(.severity != \"ok\") | .fix'

Each diagnostic is ok, a warning (serve works, but an operator should know) or an error (serve does not work). A fix can be \
pasted into psql, or into the shell if it is a command. Steps that it does not do itself follow it as a comment.

Exit codes: 0 without errors, 1 with errors, 2 for a wrong command line or configuration.";

pub(super) const TEARDOWN: &str = "\
Examples:
  tuplewatch teardown --database-uri postgres://owner@db/app
  tuplewatch teardown --config tuplewatch.yaml";

pub(super) const DEV: &str = "\
Examples:
  tuplewatch dev
  tuplewatch dev --data-dir /tmp/trial --server-grpc-port 4478 --server-http-port 4476
  tuplewatch dev --pg-bin /usr/lib/postgresql/17/bin";

pub(super) const WATCH: &str = "\
Examples:
  tuplewatch watch --tenant t1
  tuplewatch watch --tenant t1 --output json | jq -c '.changes.tuple_changes[]'
  tuplewatch watch --tenant t1 --snap-token 'AQ…' >> changes.log
  tuplewatch watch --tenant t1 --server https://feed.example:3478 --token-file token

Each change is one line of text: the time of its commit (UTC), + or -, and the tuple or attribute. In a pipe or a file each \
line is complete, with the day. Notices about the stream (lost connections, gaps, the command to resume) go to standard error.

It reconnects and resumes if that may help: the server restarts, or a limit is reached. It ends if a retry would fail again: wrong \
credentials, an unknown tenant, a token that is too old, a certificate that is not trusted.

Exit codes: 0 after Ctrl-C, 1 for a failure, 2 for a wrong command line.";

pub(super) const HEALTH: &str = "\
Examples:
  tuplewatch health                            # does it deliver changes? If not, why
  tuplewatch health --alive                    # does the process answer? For a supervisor
  tuplewatch health --service base.v1.Watch    # one service
  tuplewatch health --server https://tuplewatch.example.com:3478

Exit codes: 0 yes, 1 no.";

pub(super) const TOKEN: &str = "\
Examples:
  tuplewatch token MgMAAAAAAAA=";

pub(super) const CONFIG: &str = "\
Examples:
  tuplewatch config
  tuplewatch config --config tuplewatch.yaml --server-grpc-port 4478";

pub(super) const COMPLETIONS: &str = "\
Examples:
  tuplewatch completions bash > ~/.local/share/bash-completion/completions/tuplewatch
  tuplewatch completions zsh > ~/.zfunc/_tuplewatch    # with fpath+=(~/.zfunc) before compinit in ~/.zshrc
  tuplewatch completions fish > ~/.config/fish/completions/tuplewatch.fish

New shells load the script. To load it in this shell: source <(tuplewatch completions bash)";
