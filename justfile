# The recipes of the project; `.ci/run` is what CI runs.

default: lint test

# Format the code.
fmt:
    cargo fmt --all

# Format and lints, as strict as CI.
lint:
    cargo fmt --all --check
    cargo clippy --all-targets --locked -- -D warnings

# All tests. They start real PostgreSQL clusters.
test *args:
    cargo test {{args}}

# Fetch a major version of PostgreSQL and run tests on it, for example `just test-on 17 scenarios::oracle`.
test-on major *filter:
    bin=$(tests/postgres/fetch {{major}}) && TUPLEWATCH_PG_BIN=$bin cargo test --locked --test main {{filter}}

# A benchmark, for example `just bench large_transaction`.
bench name *args:
    cargo bench --bench {{name}} -- {{args}}

# Load and random faults for some minutes, with every change compared.
soak minutes="20":
    cargo bench --bench soak --profile dev -- --minutes {{minutes}}

# Generate the code from `proto/` again.
generate:
    TUPLEWATCH_GENERATE=1 cargo test --test generated

# API documentation, without warnings.
doc:
    RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --no-deps --document-private-items --locked

ci: lint doc test
