//! `llorch token new`: prints a token that nobody can guess.

use std::ffi::OsString;

use crate::settings::Exit;

/// Random bytes in a token: 256 bits are beyond guessing, and their 64 digits beyond what draws a warning.
const RANDOM_BYTES: usize = 32;

const HELP: &str = "Print a new bearer token: 64 hexadecimal digits from the kernel's random numbers

Usage: llorch token new

    (umask 077; llorch token new > /etc/llama-orch/token)";

/// Runs the subcommand; `args` are the words behind it.
///
/// # Errors
/// [`Exit`] with code 2 for other words than `new`, with 0 and the text of `--help`, with 1 where the
/// kernel has no random numbers.
#[allow(clippy::print_stdout, reason = "the token is what it is run for")]
pub fn run(args: &[OsString]) -> Result<(), Exit> {
    let words: Vec<_> = args.iter().map(|word| word.to_string_lossy()).collect();
    match words.iter().map(AsRef::as_ref).collect::<Vec<&str>>().as_slice() {
        ["new"] => {
            println!(
                "{}",
                new().map_err(|why| Exit::runtime(format!("there are no random numbers: {why}")))?
            );
            Ok(())
        }
        ["--help" | "-h"] => Err(Exit { code: 0, message: HELP.into() }),
        _ => Err(Exit::usage("token has one command: llorch token new")),
    }
}

fn new() -> Result<String, getrandom::Error> {
    let mut bytes = [0; RANDOM_BYTES];
    getrandom::fill(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::auth::Tokens;

    #[test]
    fn new_tokens_are_good_ones_and_never_the_same() {
        let (one, other) = (new().expect("random numbers"), new().expect("random numbers"));
        assert_ne!(one, other);
        assert!(Tokens::parse(&one).is_ok_and(|tokens| !tokens.is_short()), "{one}");
        assert_eq!(run(&["old".into()]).expect_err("no such command").code, 2);
    }
}
