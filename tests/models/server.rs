//! A server of files that does what a test tells it to, good or bad.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// What a client asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ask {
    pub(crate) path: String,
    pub(crate) range: Option<Range<usize>>,
    pub(crate) authorization: Option<String>,
}

/// What it gets.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Told instead of the body's own length; `Some(None)` tells none.
    length: Option<Option<usize>>,
    /// So much of the body, then the end of the connection.
    cut: Option<usize>,
    /// Silence in the place of that end.
    silence: Duration,
    /// A pause after each this many bytes.
    slow: Option<(usize, Duration)>,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Reply {
        Reply {
            status,
            headers: Vec::new(),
            body: b"{}".to_vec(),
            length: None,
            cut: None,
            silence: Duration::ZERO,
            slow: None,
        }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Reply {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn body(mut self, body: &[u8]) -> Reply {
        self.body = body.to_vec();
        self
    }

    pub(crate) fn length(mut self, length: Option<usize>) -> Reply {
        self.length = Some(length);
        self
    }

    pub(crate) fn cut(mut self, bytes: usize) -> Reply {
        self.cut = Some(bytes);
        self
    }

    pub(crate) fn silent_after(mut self, bytes: usize, silence: Duration) -> Reply {
        (self.cut, self.silence) = (Some(bytes), silence);
        self
    }

    pub(crate) fn slow(mut self, bytes: usize, pause: Duration) -> Reply {
        self.slow = Some((bytes, pause));
        self
    }

    /// `content` as a good server gives it: the part that was asked for, or all.
    pub(crate) fn of(content: &[u8], etag: &str, ask: &Ask) -> Reply {
        let reply = match &ask.range {
            Some(range) if range.start >= content.len() => Reply::status(416),
            Some(range) => {
                let end = range.end.min(content.len());
                let told = format!("bytes {}-{}/{}", range.start, end - 1, content.len());
                Reply::status(206).body(&content[range.start..end]).header("Content-Range", &told)
            }
            None => Reply::status(200).body(content),
        };
        if etag.is_empty() { reply } else { reply.header("ETag", etag) }
    }
}

/// Which answer an ask gets; `usize` counts the asks before it.
type Behaviour = dyn Fn(&Ask, usize) -> Reply + Send + Sync;

/// A server on a port of its own. Its threads end with the test's process.
pub(crate) struct Server {
    pub(crate) port: u16,
    asks: Arc<Mutex<Vec<Ask>>>,
}

impl Server {
    pub(crate) fn start(behaviour: impl Fn(&Ask, usize) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let asks = Arc::new(Mutex::new(Vec::new()));
        let (seen, behaviour): (_, Arc<Behaviour>) = (Arc::clone(&asks), Arc::new(behaviour));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, behaviour) = (Arc::clone(&seen), Arc::clone(&behaviour));
                thread::spawn(move || {
                    let _ = converse(&stream, &seen, &*behaviour);
                });
            }
        });
        Server { port, asks }
    }

    /// A good server of one file under any path.
    pub(crate) fn good(content: &[u8]) -> Server {
        let content = content.to_vec();
        Server::start(move |ask, _| Reply::of(&content, "\"v1\"", ask))
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(crate) fn asks(&self) -> Vec<Ask> {
        self.asks.lock().expect("no test panicked in it").clone()
    }
}

fn converse(stream: &TcpStream, seen: &Mutex<Vec<Ask>>, behaviour: &Behaviour) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::new(stream);
    while let Some(ask) = read(&mut input)? {
        let before = {
            let mut seen = seen.lock().expect("no test panicked in it");
            seen.push(ask.clone());
            seen.len() - 1
        };
        if !answer(stream, &behaviour(&ask, before))? {
            break;
        }
    }
    stream.shutdown(std::net::Shutdown::Both)
}

fn read(input: &mut impl BufRead) -> std::io::Result<Option<Ask>> {
    let mut line = String::new();
    if input.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut ask = Ask { path: line.split(' ').nth(1).unwrap_or_default().into(), ..Ask::default() };
    loop {
        line.clear();
        input.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { return Ok(Some(ask)) };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => ask.authorization = Some(value.into()),
            "range" => {
                let span = value.strip_prefix("bytes=").and_then(|span| span.split_once('-'));
                let (first, last) = span.expect("a span of bytes");
                let number = |text: &str| text.parse::<usize>().expect("a number");
                ask.range = Some(number(first)..number(last) + 1);
            }
            _ => {}
        }
    }
}

/// Whether the connection goes on.
fn answer(mut stream: &TcpStream, reply: &Reply) -> std::io::Result<bool> {
    let mut head = format!("HTTP/1.1 {} Told\r\n", reply.status);
    let length = reply.length.unwrap_or(Some(reply.body.len()));
    if let Some(length) = length {
        head.push_str(&format!("Content-Length: {length}\r\n"));
    }
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    let sent = &reply.body[..reply.cut.unwrap_or(reply.body.len()).min(reply.body.len())];
    match reply.slow {
        Some((bytes, pause)) => {
            for piece in sent.chunks(bytes) {
                stream.write_all(piece)?;
                thread::sleep(pause);
            }
        }
        None => stream.write_all(sent)?,
    }
    thread::sleep(reply.silence);
    Ok(reply.cut.is_none() && length == Some(reply.body.len()))
}
