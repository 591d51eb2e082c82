//! "Did you mean …": finds the known name that an unknown one was probably meant to be.

/// The only known name that is near `unknown`: a few typing errors away, or equal to it without its parents.
pub(crate) fn nearest<'a>(unknown: &str, known: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    // One typing error in three letters, two at most: a wider search would mislead more often than it helps.
    let slips_max = (unknown.chars().count() / 3).min(2);
    let slips_min = known.clone().map(|name| distance(unknown, name)).min()?;
    if slips_min <= slips_max {
        return only(known.filter(|name| distance(unknown, name) == slips_min));
    }
    only(known.filter(|name| name.strip_suffix(unknown).is_some_and(|parents| parents.ends_with('.'))))
}

fn only<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = names.next()?;
    names.next().is_none().then_some(name)
}

/// The number of letters to insert, remove or replace to turn `left` into `right` (Levenshtein).
fn distance(left: &str, right: &str) -> usize {
    // Names longer than any key are not worth the quadratic work.
    const LENGTH_MAX: usize = 128;
    if left.len() > LENGTH_MAX || right.len() > LENGTH_MAX {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=right.chars().count()).collect();
    for (above_first, l) in left.chars().enumerate() {
        let mut diagonal = above_first;
        let mut before = above_first + 1;
        let mut next = vec![before];
        for (r, above) in right.chars().zip(row.iter().skip(1)) {
            before = (diagonal + usize::from(l != r)).min(before + 1).min(above + 1);
            diagonal = *above;
            next.push(before);
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_near_name_is_suggested() {
        let known = ["server", "server.host", "server.grpc", "server.grpc.port", "database.uri"];
        for (unknown, expected) in [
            ("server.hots", Some("server.host")),
            ("sever", Some("server")),
            ("server.grpc.prot", Some("server.grpc.port")),
            ("database.url", Some("database.uri")),
            ("uri", Some("database.uri")),
            ("grpc.port", Some("server.grpc.port")),
            ("server.http", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(nearest(unknown, known.into_iter()), expected, "{unknown:?}");
        }
        assert_eq!(nearest("portx", ["porta", "portb"].into_iter()), None);
    }

    #[test]
    fn distances_count_single_letters() {
        for (left, right, expected) in [
            ("", "", 0),
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("port", "prot", 2),
            ("größe", "grösse", 2),
        ] {
            assert_eq!(distance(left, right), expected, "{left:?} {right:?}");
        }
    }
}
