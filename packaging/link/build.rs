//! Lets the linker lay the functions that the daemons run all day side by side.
//!
//! The kernel maps a program's code in blocks of 64 KiB. Where these functions lie as they come, among many
//! that hardly ever run, nearly every block holds one, and a daemon keeps nearly all of its code resident; side
//! by side they take a third of it. `record`, beside this, finds out which they are and writes `order.ld`.

#![expect(clippy::print_stdout, reason = "this is how a build script speaks to cargo")]

use std::{env, path::PathBuf};

fn main() {
    let script = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"))
        .join("packaging/link/order.ld");
    println!("cargo::rerun-if-changed={}", script.display());
    // Small programs are optimised ones; and only GNU ld and lld read such scripts.
    let optimised = env::var("OPT_LEVEL").is_ok_and(|level| level != "0");
    let linux = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    let other_linker = ["mold", "gold", "wild"].iter().any(|name| flags.contains(name));
    if optimised && linux && !other_linker {
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
}
