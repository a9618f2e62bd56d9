//! How docker's words are read: whether `docker run` leaves its container to itself. PURE.
//!
//! Flags end where the image begins, and what follows that is the engine's own. So it has to be known which flags
//! take no value; all others take the next word, unless theirs follows an equals sign. podman and nerdctl speak
//! the same language.

/// Programs that understand docker's words.
pub const TOOLS: &[&str] = &["docker", "podman", "nerdctl"];
/// Short flags without a value.
const SHORT_SWITCHES: &str = "ditPq";
/// Long flags without a value.
const SWITCHES: &[&str] = &[
    "detach",
    "disable-content-trust",
    "env-host",
    "help",
    "http-proxy",
    "init",
    "interactive",
    "no-healthcheck",
    "no-hostname",
    "no-hosts",
    "oom-kill-disable",
    "passwd",
    "privileged",
    "publish-all",
    "quiet",
    "read-only",
    "read-only-tmpfs",
    "replace",
    "rm",
    "rmi",
    "sig-proxy",
    "tls-verify",
    "tty",
    "use-api-socket",
];

/// Whether the flags of `docker run`, the words behind `run`, leave the container to itself.
#[must_use]
pub fn is_detached<'a>(flags: impl IntoIterator<Item = &'a str>) -> bool {
    let mut detached = false;
    let mut words = flags.into_iter();
    while let Some(word) = words.next() {
        if word == "--" {
            break;
        }
        let takes_next = if let Some(long) = word.strip_prefix("--") {
            let (name, value) =
                long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
            if name == "detach" {
                detached = is_true(value);
            }
            value.is_none() && !SWITCHES.contains(&name)
        } else if let Some(short) = word.strip_prefix('-').filter(|short| !short.is_empty()) {
            short_flags(short, &mut detached)
        } else {
            break;
        };
        if takes_next {
            words.next();
        }
    }
    detached
}

/// Reads several flags in one word; returns whether the last of them takes the next word.
fn short_flags(short: &str, detached: &mut bool) -> bool {
    for (at, flag) in short.char_indices() {
        let rest = &short[at + flag.len_utf8()..];
        if !SHORT_SWITCHES.contains(flag) {
            return rest.is_empty();
        }
        let value = rest.strip_prefix('=');
        if flag == 'd' {
            *detached = is_true(value);
        }
        if value.is_some() {
            return false;
        }
    }
    false
}

fn is_true(value: Option<&str>) -> bool {
    value.is_none_or(|value| matches!(value, "1" | "t" | "T" | "true" | "TRUE" | "True"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_flags_before_the_image_count() {
        for (flags, detached) in [
            ("-d image", true),
            ("--rm -it -d --gpus all image", true),
            ("-itd image", true),
            ("-dp 80:80 image", true),
            ("--name -d image", false),
            ("--name x -p 1:2 --detach image", true),
            ("--detach=true image", true),
            ("--detach=false image", false),
            ("-d=false image", false),
            ("-d --detach=0 image", false),
            ("--rm image -d", false),
            ("-e -d image", false),
            ("-ed image", false),
            ("--env=A -v/a:/b -d image", true),
            ("--init --privileged image --detach", false),
            ("-- -d", false),
            ("image", false),
            ("", false),
        ] {
            assert_eq!(is_detached(flags.split(' ')), detached, "{flags}");
        }
    }

    proptest! {
        #[test]
        fn no_words_panic(words in prop::collection::vec("[-=a-z\u{e9}]{0,6}", 0..8)) {
            let _ = is_detached(words.iter().map(String::as_str));
        }
    }
}
