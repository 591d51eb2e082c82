//! A password, and its preparation for authentication.
//!
//! PostgreSQL accepts any bytes. `password` and `md5` use them unchanged. SCRAM uses a prepared form of text (SASLprep,
//! RFC 4013), so that two encodings of the same letter are the same password. A password that cannot be prepared is
//! used unchanged. Both sides must prepare it identically, so this module follows PostgreSQL's own code
//! (src/common/saslprep.c), even where that differs from the RFC.

use std::borrow::Cow;
use std::fmt;

use stringprep::tables;
use unicode_normalization::UnicodeNormalization as _;

/// A password. It is never printed.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Password(Vec<u8>);

impl Password {
    pub(super) fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(bytes.into())
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The prepared password for SCRAM. `None` if it is not text, which the SCRAM implementation requires.
    pub(super) fn prepared(&self) -> Option<Cow<'_, str>> {
        str::from_utf8(&self.0).ok().map(prepare)
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

fn prepare(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    let spaces = |c| if tables::non_ascii_space_character(c) { ' ' } else { c };
    let mapped: String = text.chars().map(spaces).filter(|c| !tables::commonly_mapped_to_nothing(*c)).collect();
    // PostgreSQL checks these before it normalizes. The RFC prescribes the opposite order.
    if mapped.is_empty() || mapped.contains(is_prohibited) || has_prohibited_directions(&mapped) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(mapped.nfkc().collect())
}

fn is_prohibited(c: char) -> bool {
    tables::non_ascii_space_character(c)
        || tables::ascii_control_character(c)
        || tables::non_ascii_control_character(c)
        || tables::private_use(c)
        || tables::non_character_code_point(c)
        || tables::inappropriate_for_plain_text(c)
        || tables::inappropriate_for_canonical_representation(c)
        || tables::change_display_properties_or_deprecated(c)
        || tables::tagging_character(c)
        || tables::unassigned_code_point(c)
}

/// RFC 3454, section 6: text from right to left must begin and end so, and must not contain text from left to right.
fn has_prohibited_directions(text: &str) -> bool {
    let at_both_ends = text.starts_with(tables::bidi_r_or_al) && text.ends_with(tables::bidi_r_or_al);
    text.contains(tables::bidi_r_or_al) && (text.contains(tables::bidi_l) || !at_both_ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_prepared_as_postgresql_prepares_them() {
        let check = |text: &str, prepared: &str| {
            assert_eq!(Password::new(text).prepared().as_deref(), Some(prepared), "{text:?}");
        };
        for raw in ["", "secret", "a\u{7}b", "naïve"] {
            check(raw, raw);
        }
        check("I\u{ad}X", "IX");
        check("\u{aa}", "a");
        check("a\u{a0}b", "a b");
        check("e\u{301}", "\u{e9}");
        check("\u{2168}", "IX");
        // An empty result; private, control and unassigned characters; a mixture of directions.
        for raw in ["\u{ad}", "\u{200c}\u{feff}", "\u{e000}\u{aa}", "é\u{7}", "\u{221}\u{aa}", "\u{627}1", "a\u{627}"]
        {
            check(raw, raw);
        }
        // These are prohibited only before normalization, and mixed only after it.
        check("\u{340}\u{aa}", "\u{340}\u{aa}");
        check("a\u{2135}", "a\u{5d0}");
        assert_eq!(Password::new(*b"\xff").prepared(), None);
        assert_eq!(format!("{:?}", Password::new("secret")), "***");
    }
}
