//! Settings that take one word of a short list.

use std::fmt;

/// A closed set of words, spelled as in the configuration.
pub(super) trait Choice: Copy + fmt::Display + 'static {
    const ALL: &'static [Self];
}

/// Defines an enum together with the words for its variants, so that the two cannot drift apart.
macro_rules! choice {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$inner])* $variant,)+ }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word,)+ })
            }
        }

        impl Choice for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];
        }
    };
}

choice! {
    /// The least severe event that is logged.
    LogLevel {
        /// Every message of the replication stream.
        Trace = "trace",
        /// The steps that lead to each decision.
        Debug = "debug",
        /// Changes of state that an operator may want to know later.
        Info = "info",
        /// Conditions that an operator should look at.
        Warn = "warn",
        /// Errors that stop this process or lose history.
        Error = "error",
    }
}

choice! {
    /// The format of a log line.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

choice! {
    /// The method that callers authenticate with.
    AuthnMethod {
        /// A key of a configured list.
        Preshared = "preshared",
        /// A JWT of an OpenID Connect issuer.
        Oidc = "oidc",
    }
}

choice! {
    /// The treatment of a row that the mapping cannot turn into changes.
    OnUndecodable {
        /// The tenants of the row get a gap; all other tenants continue.
        Gap = "gap",
        /// The stream stops before the row.
        Halt = "halt",
    }
}

choice! {
    /// Whether standbys keep a copy of the slot.
    Failover {
        /// Yes, from PostgreSQL 17 on.
        Auto = "auto",
        /// tuplewatch leaves the slot as it is.
        Off = "off",
    }
}

choice! {
    /// A mapping that ships with tuplewatch.
    Preset {
        /// The tables in schema `tuplewatch`.
        Tuples = "tuples",
        Permify = "permify",
    }
}

choice! {
    /// The form of the snap tokens in messages.
    SnapTokenFormat {
        /// `Permify` with the preset `permify`, else `Native`.
        Auto = "auto",
        /// tuplewatch's own position tokens.
        Native = "native",
        /// Transaction ids, as Permify writes them.
        Permify = "permify",
    }
}
