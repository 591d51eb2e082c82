//! The forms of ids and names in Permify, which the constraints of the tables require as well.
//!
//! | text | form |
//! | --- | --- |
//! | ids | 1 to 128 of `a-z A-Z 0-9 _ - @ . : +`, or a single `*` |
//! | types, relations, attribute names | 1 to 64 of `a-z A-Z _` |

/// The required form of an id.
pub(super) const ID: &str = "must be 1 to 128 of a-z, A-Z, 0-9, _, -, @, ., :, + or a single *";
/// The required form of a name.
pub(super) const NAME: &str = "must be 1 to 64 of a-z, A-Z and _";

pub(super) fn is_id(text: &str) -> bool {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_-@.:+".contains(&byte);
    text == "*" || (1..=128).contains(&text.len()) && text.bytes().all(letter)
}

pub(super) fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let long = |n| "a".repeat(n);
        for id in ["1", "*", "a-b_c@d.e:f+g", &long(128)] {
            assert!(is_id(id), "{id}");
        }
        for id in ["", "**", "a*", "a b", "é", "a\0", "a/b", "a\n", &long(129)] {
            assert!(!is_id(id), "{id}");
        }
        for name in ["a", "A_b", &long(64)] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "a1", "a-b", "*", "...", "a\n", &long(65)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
