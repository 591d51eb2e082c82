//! Settings that take one word of a short list.

use std::fmt;

/// A closed set of words, as they are written in the configuration.
pub(super) trait Choice: Copy + fmt::Display + 'static {
    const ALL: &'static [Self];
}

/// Defines an enum together with the words for its variants, so that the two cannot drift apart.
macro_rules! choice {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$inner])* $variant,)+ }

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
        /// What leads up to each decision.
        Debug = "debug",
        /// What an operator may want to know later.
        Info = "info",
        /// What an operator should look at.
        Warn = "warn",
        /// What stops this process or loses history.
        Error = "error",
    }
}

choice! {
    /// How a log line looks.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

choice! {
    /// How callers prove who they are.
    AuthnMethod {
        /// With a key of a list.
        Preshared = "preshared",
        /// With a JWT of an OpenID Connect issuer.
        Oidc = "oidc",
    }
}

choice! {
    /// What happens to a row that cannot be turned into changes.
    OnUndecodable {
        /// A gap for the tenants concerned; everybody else goes on.
        Gap = "gap",
        /// The process stops before it.
        Halt = "halt",
    }
}

choice! {
    /// Whether standbys keep a copy of the slot.
    Failover {
        /// From PostgreSQL 17 on.
        Auto = "auto",
        /// The slot is left as it is.
        Off = "off",
    }
}

choice! {
    /// A mapping that ships with tuplewatch.
    Preset {
        /// The tables in schema `tuplewatch`.
        Tuples = "tuples",
        /// The tables of Permify.
        Permify = "permify",
    }
}

choice! {
    /// The form of the snap tokens that are handed out.
    SnapTokenFormat {
        /// What the mapping calls for.
        Auto = "auto",
        /// Position tokens of our own.
        Native = "native",
        /// Transaction ids, as Permify writes them.
        Permify = "permify",
    }
}
