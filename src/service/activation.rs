//! Sockets that the service manager listened on before it started this process, and will go on to hold
//! when it ends: connections that arrive meanwhile wait instead of being refused.

use std::env;
use std::net::TcpListener;

use listenfd::ListenFd;

use crate::settings::Exit;

/// Most sockets that are taken over: a unit names the addresses of one daemon.
const SOCKETS_MAX: usize = 16;

/// The listening TCP sockets that were handed over with `LISTEN_FDS`, ready for a loop. Empty where there
/// are none, or where they are meant for another process (`LISTEN_PID`). To be called once, before there
/// are threads.
///
/// # Errors
/// [`Exit`] for something that is handed over and is no such socket: the unit is wrong, and to listen
/// elsewhere would hide that.
pub fn listeners() -> Result<Vec<TcpListener>, Exit> {
    let own_pid = std::process::id().to_string();
    if env::var("LISTEN_PID").is_ok_and(|pid| pid.trim() != own_pid) || env::var_os("LISTEN_PID").is_none() {
        return Ok(Vec::new());
    }
    let mut handed = ListenFd::from_env();
    if handed.len() > SOCKETS_MAX {
        return Err(Exit::config(format!(
            "LISTEN_FDS={}: at most {SOCKETS_MAX} sockets are taken over",
            handed.len()
        )));
    }
    let mut listeners = Vec::new();
    for index in 0..handed.len() {
        let wrong = |why: &dyn std::fmt::Display| {
            Exit::config(format!(
                "LISTEN_FDS: descriptor {} is no TCP socket that listens: {why}; the socket unit needs ListenStream=ADDRESS:PORT and Accept=no",
                index + 3
            ))
        };
        let taken = handed.take_tcp_listener(index).map_err(|error| wrong(&error))?;
        let listener = taken.ok_or_else(|| wrong(&"it was taken already"))?;
        match rustix::net::sockopt::socket_acceptconn(&listener) {
            Ok(true) => {}
            Ok(false) => return Err(wrong(&"it is connected")),
            Err(error) => return Err(wrong(&error)),
        }
        listener.set_nonblocking(true).map_err(|error| wrong(&error))?;
        listeners.push(listener);
    }
    Ok(listeners)
}
