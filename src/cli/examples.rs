//! What `--help` shows of each subcommand in use. A test parses every line.

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
  tuplewatch serve --config tuplewatch.yaml --reset-log    # where the change log cannot be read";

pub(super) const SETUP: &str = "\
Examples:
  tuplewatch setup --dry-run --database-uri postgres://owner@db/app
  tuplewatch setup --database-uri postgres://owner@db/app
  tuplewatch setup --config tuplewatch.yaml --recreate-slot    # after the slot was lost";

pub(super) const DOCTOR: &str = "\
Examples:
  tuplewatch doctor --config tuplewatch.yaml
  tuplewatch doctor --json | jq -r '.diagnostics[] | select(.severity != \"ok\") | .fix'

Each diagnostic is ok, a warning (it works, and somebody should know) or an error. A fix can be pasted into psql, or into the \
shell where it is a command; what it does not do by itself stands behind it as a comment.

Exit codes: 0 without errors, 1 with some, 2 where the configuration is wrong.";

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

Text is a line a change: the time of its commit (UTC), + or -, and the tuple or attribute. Into a pipe or a file each \
line is whole, with the day. What is said about the stream (connections lost, gaps, how to go on) goes to the standard error.

It reconnects where that may help (a server that restarts, a limit), and resumes. Where it cannot (credentials, a tenant that is \
not there, a token that is too old, a certificate that is not trusted) it ends.

Exit codes: 0 where it was told to end, 1 for a failure, 2 where the command line is wrong.";

pub(super) const HEALTH: &str = "\
Examples:
  tuplewatch health                            # are changes delivered? If not, why
  tuplewatch health --alive                    # does the process answer? For what restarts it
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

New shells have them then. For the present one: source <(tuplewatch completions bash)";
