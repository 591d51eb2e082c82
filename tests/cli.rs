//! While tests/main.rs is being written.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::print_stderr)]

mod support {
    pub(crate) mod change;
    pub(crate) mod postgres;
    pub(crate) mod server;
    pub(crate) mod sql;
    pub(crate) mod stream;
    pub(crate) mod wait;
}

mod scenarios {
    mod cli;
    mod dev;
}
