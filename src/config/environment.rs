//! The process' environment.

use std::ffi::OsString;

use super::error::{Error, Problem};
use super::origin::{Name, Origin, VARIABLE_PREFIX};

/// Variables of ours that are no configuration keys: they are read where the command line is.
pub(super) const OTHER_VARIABLES: &[&str] = &["TUPLEWATCH_CONFIG", "TUPLEWATCH_PG_BIN", "TUPLEWATCH_TOKEN"];

/// The variables of this process that begin with `TUPLEWATCH_`, for [`Config::load`](super::Config::load).
///
/// # Errors
///
/// Names each of them that is not valid UTF-8.
pub fn from_env() -> Result<Vec<(String, String)>, Error> {
    unicode(std::env::vars_os())
}

fn unicode(variables: impl Iterator<Item = (OsString, OsString)>) -> Result<Vec<(String, String)>, Error> {
    let mut texts = Vec::new();
    let mut problems = Vec::new();
    for (name, value) in variables {
        if !name.as_encoded_bytes().starts_with(VARIABLE_PREFIX.as_bytes()) {
            continue;
        }
        match (name.into_string(), value.into_string()) {
            (Ok(name), Ok(value)) => texts.push((name, value)),
            (name, _) => {
                let key = name.unwrap_or_else(|name| name.to_string_lossy().into_owned());
                let origin = Origin::Environment(key.clone());
                let name = Name { key, origin };
                problems.push(Problem::NotUnicode { name });
            }
        }
    }
    Error::check(problems)?;
    Ok(texts)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn a_variable_of_ours_that_is_not_unicode_is_an_error() {
        let variable = |name: &[u8], value: &[u8]| (OsString::from_vec(name.into()), OsString::from_vec(value.into()));
        let fine =
            [variable(b"OTHER", b"\xff"), variable(b"OTHER_\xff", b""), variable(b"TUPLEWATCH_LOGGER__LEVEL", b"info")];
        let texts = unicode(fine.clone().into_iter()).unwrap();
        assert_eq!(texts, [("TUPLEWATCH_LOGGER__LEVEL".into(), "info".into())]);

        let broken = [variable(b"TUPLEWATCH_DATABASE__URI", b"secret\xff"), variable(b"TUPLEWATCH_\xff", b"")];
        let error = unicode(fine.into_iter().chain(broken)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the configuration has 2 errors:\
             \n  - environment variable TUPLEWATCH_DATABASE__URI: is not valid UTF-8\
             \n  - environment variable TUPLEWATCH_\u{fffd}: is not valid UTF-8"
        );
    }
}
