//! Values as a source for serde. An error gets the path to its value on the way out, a part at each level.

use super::{Error, Section, Value};
use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer as _, MapAccess, SeqAccess, Visitor};
use serde::forward_to_deserialize_any;
use std::fmt;

impl Error {
    fn prepend(mut self, part: &str) -> Self {
        if let Self::Value { path, .. } = &mut self {
            let dot = if path.is_empty() || path.starts_with('[') { "" } else { "." };
            *path = format!("{part}{dot}{path}");
        }
        self
    }
}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Value { message: message.to_string(), path: String::new() }
    }
}

fn other_type(found: &Value, expected: &str) -> Error {
    de::Error::custom(format_args!("invalid type: {found}, expected {expected}"))
}

impl Value {
    fn into_text(self) -> Result<String, Error> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Boolean(value) => Ok(value.to_string()),
            Self::Integer(number) => Ok(number.to_string()),
            Self::Fraction(number) => Ok(number.to_string()),
            other => Err(other_type(&other, "a text")),
        }
    }

    /// Also the words that YAML 1.1 took for booleans.
    fn into_boolean(self) -> Result<bool, Error> {
        let word = match &self {
            Self::Boolean(value) => return Ok(*value),
            Self::Integer(number) => return Ok(*number != 0),
            Self::Fraction(number) => return Ok(*number != 0.0),
            Self::Text(text) => text.to_lowercase(),
            _ => String::new(),
        };
        match word.as_str() {
            "1" | "true" | "on" | "yes" => Ok(true),
            "0" | "false" | "off" | "no" => Ok(false),
            _ => Err(other_type(&self, "true or false")),
        }
    }
}

impl<'de> Deserializer<'de> for Value {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Self::Null => visitor.visit_unit(),
            Self::Boolean(value) => visitor.visit_bool(value),
            Self::Integer(number) => visitor.visit_i64(number),
            Self::Fraction(number) => visitor.visit_f64(number),
            Self::Text(text) => visitor.visit_string(text),
            Self::List(items) => visitor.visit_seq(Items { items: items.into_iter(), index: 0 }),
            Self::Section(section) => visitor.visit_map(Entries { entries: section.into_iter(), value: None }),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.into_boolean()?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(self.into_text()?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(self.into_text()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self {
            Self::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct seq tuple tuple_struct map struct
        enum identifier ignored_any
    }
}

struct Items {
    items: std::vec::IntoIter<Value>,
    index: usize,
}

impl<'de> SeqAccess<'de> for Items {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let part = format!("[{}]", self.index);
        self.index += 1;
        seed.deserialize(item).map(Some).map_err(|error| error.prepend(&part))
    }
}

struct Entries {
    entries: <Section as IntoIterator>::IntoIter,
    /// What belongs to the key that was read last.
    value: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.entries.next() else { return Ok(None) };
        let (key, _) = self.value.insert((key, value));
        let key: StrDeserializer<'_, Error> = key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (key, value) = self.value.take().ok_or_else(|| <Error as de::Error>::custom("a value without a key"))?;
        seed.deserialize(value).map_err(|error| error.prepend(&key))
    }
}

#[cfg(test)]
mod tests {
    use super::super::from_str;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Shop {
        name: String,
        #[serde(default)]
        open: bool,
        owner: Option<String>,
        #[serde(default)]
        shelves: Vec<Shelf>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Shelf {
        goods: Vec<String>,
    }

    fn shop(name: &str) -> Shop {
        Shop { name: name.to_owned(), open: false, owner: None, shelves: Vec::new() }
    }

    #[test]
    fn scalars_convert_if_nothing_is_lost() {
        for (yaml, expected) in [
            ("name: a", shop("a")),
            ("name: 7", shop("7")),
            ("name: 1.5", shop("1.5")),
            ("name: true", shop("true")),
            ("name: ''", shop("")),
            ("name: a\nowner:", shop("a")),
            ("name: a\nowner: 1", Shop { owner: Some("1".to_owned()), ..shop("a") }),
            ("name: a\nopen: true", Shop { open: true, ..shop("a") }),
            ("name: a\nopen: 'Yes'", Shop { open: true, ..shop("a") }),
            ("name: a\nopen: on", Shop { open: true, ..shop("a") }),
            ("name: a\nopen: 0", shop("a")),
            ("name: a\nopen: no", shop("a")),
            (
                "name: a\nshelves: [{goods: []}, {goods: [x, 0, no]}]",
                Shop {
                    shelves: vec![
                        Shelf { goods: Vec::new() },
                        Shelf { goods: ["x", "0", "no"].map(str::to_owned).to_vec() },
                    ],
                    ..shop("a")
                },
            ),
        ] {
            assert_eq!(from_str::<Shop>(yaml), Ok(expected), "{yaml}");
        }
    }

    #[test]
    fn an_error_names_the_key() {
        for (yaml, expected) in [
            ("", "missing field `name`"),
            ("name: [a]", "invalid type: a list, expected a text for key `name`"),
            ("name:", "invalid type: nothing, expected a text for key `name`"),
            ("name: a\nopen: maybe", "invalid type: text \"maybe\", expected true or false for key `open`"),
            ("nam: a", "unknown field `nam`, expected one of `name`, `open`, `owner`, `shelves`"),
            ("name: a\nshelves: x", "invalid type: string \"x\", expected a sequence for key `shelves`"),
            ("name: a\nshelves: [{goods: []}, {}]", "missing field `goods` for key `shelves[1]`"),
            (
                "name: a\nshelves:\n- goods: [x, {}]",
                "invalid type: a section, expected a text for key `shelves[0].goods[1]`",
            ),
            ("just text", "invalid type: a text, expected keys with values"),
            ("- a", "invalid type: a list, expected keys with values"),
            ("a: 1\n---\nb: 1", "got 2 YAML documents, expected 1"),
            ("{a: 1}: b", "a key must be a text, a number or a boolean"),
            ("name: [", "while parsing a node, did not find expected node content at byte 7 line 2 column 1"),
        ] {
            assert_eq!(from_str::<Shop>(yaml).unwrap_err().to_string(), expected, "{yaml}");
        }
    }
}
