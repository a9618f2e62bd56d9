//! Who may call what, as a caller notices: every route of both daemons with every kind of credential, the
//! replacement of tokens under load, names and web pages that are not ours, and what an engine is shown.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod harness;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use harness::*;
use llama_orch::service::auth::{Policy, Scope};
use llama_orch::service::routes::{ANY_METHOD, Route};
use rustix::process::Signal;

/// Tokens of one scope, before and after their replacement.
struct Rotated {
    withdrawn: String,
    previous: String,
    current: String,
    file: PathBuf,
}

impl Rotated {
    fn new(scope: &str, directory: &Path) -> Rotated {
        let token = |age: &str| format!("{scope}-{age}-0123456789abcdef0123456789abcdef");
        let file = directory.join(format!("{scope}-token"));
        fs::write(&file, format!("{}\n{}\n", token("previous"), token("withdrawn"))).expect("written");
        Rotated {
            withdrawn: token("withdrawn"),
            previous: token("previous"),
            current: token("current"),
            file,
        }
    }

    fn rotate(&self) {
        let new = self.file.with_extension("new");
        fs::write(&new, format!("{}\n{}\n", self.current, self.previous)).expect("written");
        fs::rename(new, &self.file).expect("renamed");
    }

    fn name(&self) -> String {
        self.file.to_string_lossy().into_owned()
    }
}

/// Sends bytes from an address of its own, which has not made any mistake yet.
fn send(port: u16, text: &str) -> Answer {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let host = NEXT.fetch_add(1, Ordering::Relaxed);
    let from = Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 0)) + host);
    let descriptor = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&descriptor, &SocketAddrV4::new(from, 0)).expect("an address");
    connect(&descriptor, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).expect("connected");
    send_on(TcpStream::from(descriptor), text).expect("an answer")
}

/// As [`send`] from the usual address; `None` if the connection breaks.
fn send_on(mut stream: TcpStream, text: &str) -> Option<Answer> {
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    // What is refused may be refused before all of it is read.
    let _ = stream.write_all(text.as_bytes());
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let mut body = String::new();
    // A stream of events may have no end.
    if !head.contains("text/event-stream") {
        let _ = reader.read_to_string(&mut body);
    }
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok())?;
    Some(Answer { status, head, body })
}

fn request(method: &str, path: &str, fields: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n{fields}\r\n"
    )
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

/// A path of a route, and the methods that lead there.
fn example<E>(route: &Route<E>) -> (String, Vec<&'static str>) {
    let path: Vec<&str> = route
        .path
        .split('/')
        .map(|part| match part {
            rest if rest.ends_with("...}") => "x/y",
            "{gpu}" => "0",
            name if name.starts_with('{') => "x",
            literal => literal,
        })
        .collect();
    let methods = match route.method {
        ANY_METHOD => vec!["GET", "POST", "BREW"],
        "GET" => vec!["GET", "HEAD"],
        method => vec![method],
    };
    (path.join("/"), methods)
}

/// Holds every route of a daemon against every kind of credential.
fn matrix<E>(port: u16, prefix: &str, routes: &[Route<E>], scopes: &[(Scope, &Rotated)]) -> usize {
    let mut cases = 0;
    let mut ask = |method: &str, path: &str, fields: &str| {
        cases += 1;
        send(port, &request(method, path, fields))
    };
    for route in routes {
        let (path, methods) = example(route);
        let path = format!("{prefix}{path}");
        for method in methods {
            let what = format!("{method} {path}");
            let mut expect = |fields: &str, status: u16| {
                let answer = ask(method, &path, fields);
                match route.policy {
                    Policy::Public | Policy::Page => {
                        assert!(matches!(answer.status, 200 | 503), "{what} {fields}: {answer:?}")
                    }
                    _ => assert_eq!(answer.status, status, "{what} {fields}: {answer:?}"),
                }
            };
            expect("", 401);
            expect(&bearer("bad-0123456789abcdef0123456789abcdef"), 401);
            expect(&format!("X-API-Key: {}\r\n", scopes[0].1.current), 401);
            for (scope, tokens) in scopes {
                expect(&bearer(&tokens.withdrawn), 401);
                expect(&format!("{0}{0}", bearer(&tokens.current)), 401);
                if !route.policy.admits(*scope) {
                    expect(&bearer(&tokens.current), 403);
                    expect(&bearer(&tokens.previous), 403);
                }
            }
        }
    }
    // The good ones last: some of them change what the daemon does.
    for route in routes {
        let (path, methods) = example(route);
        for (scope, tokens) in scopes.iter().filter(|(scope, _)| route.policy.admits(*scope)) {
            for (method, token) in methods.iter().flat_map(|m| [(m, &tokens.current), (m, &tokens.previous)])
            {
                let answer = ask(method, &format!("{prefix}{path}"), &bearer(token));
                assert!(
                    !matches!(answer.status, 401 | 403 | 405 | 421) && answer.status < 600,
                    "{method} {path} as {scope:?}: {answer:?}"
                );
            }
        }
    }
    for path in [
        "/index.html",
        "/no/such/path",
        "/v2",
        "/v1/models/../../health",
        "//health",
        "/health/",
        "/%68ealth",
    ] {
        assert_eq!(ask("GET", path, "").status, 401, "{path}");
    }
    cases
}

#[test]
fn every_route_is_opened_by_the_tokens_of_its_policy_alone() {
    let directory = tempfile::tempdir().expect("a directory");
    let [client, node, admin] =
        ["client", "node", "admin"].map(|scope| Rotated::new(scope, directory.path()));
    let (control_port, agent_port) = (free_port(), free_port());
    let (control_addr, agent_addr) = (format!("127.0.0.1:{control_port}"), format!("127.0.0.1:{agent_port}"));
    let files = [client.name(), node.name(), admin.name()];
    let control = [
        ("ORCHESTRATORD_ADDR", control_addr.as_str()),
        ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
        ("LLORCH_CLIENT_TOKEN_FILE", &files[0]),
        ("LLORCH_NODE_TOKEN_FILE", &files[1]),
        ("LLORCH_ADMIN_TOKEN_FILE", &files[2]),
    ];
    let agent = [
        ("POOL_MANAGERD_ADDR", agent_addr.as_str()),
        ("LLORCH_NODE_TOKEN_FILE", &files[1]),
        ("LLORCH_ADMIN_TOKEN_FILE", &files[2]),
    ];
    let control = Process::start(ORCHESTRATORD, &[], &control, directory.path());
    let agent = Process::start(POOL_MANAGERD, &[], &agent, directory.path());
    for (port, path) in [(control_port, "/v2/nodes"), (agent_port, "/v2/gpus")] {
        let ask = |token: &str| ask(port, "GET", path, Some(token), "").map(|answer| answer.status);
        until("the daemon", || ask(&admin.withdrawn).filter(|status| *status == 200));
    }
    [&client, &node, &admin].into_iter().for_each(Rotated::rotate);
    for (port, path) in [(control_port, "/v2/nodes"), (agent_port, "/v2/gpus")] {
        let ask = |token: &str| ask(port, "GET", path, Some(token), "").map(|answer| answer.status);
        until("the new token", || ask(&admin.current).filter(|status| *status == 200));
    }
    let scopes = [(Scope::Client, &client), (Scope::Node, &node), (Scope::Admin, &admin)];
    let begun = Instant::now();
    let cases = matrix(control_port, "", llama_orch::orchestratord::api::ROUTES, &scopes)
        + matrix(agent_port, "", llama_orch::pool_managerd::api::ROUTES, &scopes[1..])
        + matrix(agent_port, "/v2", llama_orch::pool_managerd::api::ROUTES, &scopes[1..]);
    assert!(cases > 1_500, "{cases} in {:?}", begun.elapsed());
    // The clients' token is none that an agent knows.
    let (path, _) = example(&llama_orch::pool_managerd::api::ROUTES[0]);
    assert_eq!(send(agent_port, &request("GET", &path, &bearer(&client.current))).status, 401);
    // SIGKILL leaves nothing behind in the logs either.
    for log in [control.log(), agent.log()] {
        for tokens in [&client, &node, &admin] {
            for token in [&tokens.withdrawn, &tokens.previous, &tokens.current] {
                assert!(!log.contains(token.as_str()), "{log}");
            }
        }
    }
}

#[test]
fn odd_ways_of_showing_a_token_are_no_ways_around_it() {
    let token = "good-0123456789abcdef0123456789abcdef";
    let home = Home::start(&[("LLORCH_API_TOKEN", token)]);
    let ask = |path: &str, fields: &str| send(home.port, &request("GET", path, fields));
    let status = |fields: &str| ask("/v2/pools", fields).status;
    // From this machine, and yet.
    let missing = ask("/v2/pools", "");
    assert_eq!((missing.status, &missing.json()["code"]), (401, &40101.into()));
    assert_eq!(missing.field("www-authenticate"), Some("Bearer"));
    let bad = ask("/v2/pools", &bearer("x"));
    assert_eq!((bad.status, &bad.json()["code"]), (401, &40102.into()));
    for query in ["token", "access_token", "api_key", "Authorization"] {
        assert_eq!(ask(&format!("/v2/pools?{query}={token}"), "").status, 401, "{query}");
    }
    let other = bearer("x");
    for (what, fields) in [
        ("two, the good one first", bearer(token) + &other),
        ("two, the good one last", other + &bearer(token)),
        ("a list", format!("Authorization: Bearer {token}, Bearer {token}\r\n")),
        ("a cookie", format!("Cookie: Authorization=Bearer {token}\r\n")),
        ("another scheme", format!("Authorization: Basic {token}\r\n")),
        ("no scheme", format!("Authorization: {token}\r\n")),
        ("another field", format!("X-Authorization: Bearer {token}\r\n")),
        ("a prefix", bearer(&token[..token.len() - 1])),
        ("one more character", bearer(&format!("{token}x"))),
        ("another case", bearer(&token.to_uppercase())),
    ] {
        assert_eq!(status(&fields), 401, "{what}");
    }
    for (what, fields) in [
        ("the scheme has no case", format!("authorization: bearer {token}\r\n")),
        ("nor has it one here", format!("AUTHORIZATION: BEARER {token}\r\n")),
        ("blanks around it", format!("Authorization:   Bearer   {token}   \r\n")),
    ] {
        assert_eq!(status(&fields), 200, "{what}");
    }
    for (what, value) in
        [("NUL", format!("{token}\0")), ("a line", format!("{token}\n")), ("CR", format!("{token}\rx"))]
    {
        assert_eq!(status(&bearer(&value)), 400, "{what}");
    }
    let large = status(&bearer(&"x".repeat(1 << 20)));
    assert!(matches!(large, 400 | 431), "{large}");
    assert_eq!(status(&bearer(&"x".repeat(20_000))), 401, "longer than any token may be");
    assert_eq!(status(&bearer(token)), 200, "it is there still");
    assert!(!home.daemon.log().contains(token));
}

#[test]
fn guessers_are_slowed_counted_and_named_without_their_guesses() {
    let token = "good-0123456789abcdef0123456789abcdef";
    let home = Home::start(&[("LLORCH_API_TOKEN", token)]);
    let guess = |n: u32| ask(home.port, "GET", "/v2/pools", Some(&format!("guessed-canary-{n}")), "");
    let (all, begun) = (Instant::now(), Instant::now());
    for n in 0..12 {
        assert_eq!(guess(n).expect("an answer").status, 401);
    }
    // Three at once, then 25, 50, 100, 200 and five times 400 ms.
    assert!(begun.elapsed() >= Duration::from_millis(2_375), "{:?}", begun.elapsed());
    // Many at once wait beside each other, nobody else waits, and whoever leaves is forgotten.
    let waiting: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", home.port)).expect("a connection");
            stream.write_all(request("GET", "/v2/pools", &bearer("guessed")).as_bytes()).expect("sent");
            stream
        })
        .collect();
    let begun = Instant::now();
    let good = ask(home.port, "GET", "/v2/pools", Some(token), "").expect("an answer");
    assert!(good.status == 200 && begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    drop(waiting);
    let metrics = get(home.port, "/metrics").expect("metrics").body;
    assert!(metrics.contains("orchestratord_auth_failures_total{reason=\"bad\"}"), "{metrics}");
    let log = home.daemon.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("refused 127.0.0.1")).collect();
    let most = 1 + all.elapsed().as_secs() / 30;
    assert!(!lines.is_empty() && lines.len() as u64 <= most, "one every 30 s: {log}");
    // printf %s guessed-canary-0 | sha256sum
    assert!(lines[0].contains("begins with 07521d") && lines[0].contains("/v2/pools"), "{log}");
    assert!(!log.contains("guessed-canary"), "{log}");
}

#[test]
fn tokens_are_replaced_under_load_without_a_failed_request() {
    let directory = tempfile::tempdir().expect("a directory");
    let [old, new] = ["old", "new"].map(|name| format!("{name}-0123456789abcdef0123456789abcdef"));
    let files = ["control", "agent"].map(|name| directory.path().join(name));
    let write = |file: &PathBuf, text: &str| {
        let temporary = file.with_extension("tmp");
        fs::write(&temporary, text).expect("written");
        fs::rename(temporary, file).expect("renamed");
    };
    files.iter().for_each(|file| write(file, &old));
    let (control_port, agent_port, engine_port) = (free_port(), free_port(), free_port());
    let (addr, agent_addr) = (format!("127.0.0.1:{control_port}"), format!("127.0.0.1:{agent_port}"));
    let url = format!("http://{addr}");
    let names = [files[0].to_string_lossy(), files[1].to_string_lossy()];
    let control = [
        ("ORCHESTRATORD_ADDR", addr.as_str()),
        ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
        ("ORCHESTRATORD_HEARTBEAT_INTERVAL_SECS", "1"),
        ("LLORCH_API_TOKEN_FILE", &names[0]),
    ];
    let agent = [
        ("POOL_MANAGERD_ADDR", agent_addr.as_str()),
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_NODE_ID", "rotated"),
        ("ORCHESTRATORD_URL", &url),
        ("LLORCH_API_TOKEN_FILE", &names[1]),
    ];
    let control = Process::start(ORCHESTRATORD, &[], &control, directory.path());
    let agent = Process::start(POOL_MANAGERD, &[], &agent, directory.path());
    let fast = ["--prefill-ms", "0", "--tokens-per-second", "0"];
    let _engine = demo_engine(engine_port, &fast, directory.path());
    hand_over(&directory.path().join(".runtime/engines"), "a.json", &handoff(engine_port, "r0", 8));
    let status =
        |port: u16, path: &str, token: &str| ask(port, "GET", path, Some(token), "").map(|a| a.status);
    until("a routable replica", || {
        let nodes =
            ask(control_port, "GET", "/v2/nodes", Some(&old), "").filter(|answer| answer.status == 200)?;
        (nodes.json()["nodes"][0]["replicas"][0]["routable"] == true).then_some(())
    });

    // Clients that never pause; which token they show is decided here.
    let (shown, done, over) =
        (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU32::new(0)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..3)
        .map(|_| {
            let (shown, done, over) = (shown.clone(), done.clone(), over.clone());
            let tokens = [old.clone(), new.clone()];
            thread::spawn(move || {
                let body = r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":2}"#;
                while over.load(Ordering::Relaxed) == 0 {
                    let token = &tokens[shown.load(Ordering::SeqCst)];
                    let answer = ask(control_port, "POST", "/v1/chat/completions", Some(token), body);
                    let answer = answer.expect("an answer");
                    assert_eq!(answer.status, 200, "{answer:?}");
                    done.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    let some_more = |what: &str| {
        let before = done.load(Ordering::SeqCst);
        until(what, || {
            assert!(clients.iter().all(|client| !client.is_finished()), "a client failed: {what}");
            (done.load(Ordering::SeqCst) >= before + 30).then_some(())
        });
    };
    some_more("requests with the old token");
    // Files of no use change nothing.
    for bad in ["", "\u{0}\u{1}", &"x".repeat(100_000), "a\nb\nc"] {
        files.iter().for_each(|file| write(file, bad));
        some_more("requests in spite of bad files");
    }
    until("a warning", || control.log().contains("they stay as they are").then_some(()));
    files.iter().for_each(|file| write(file, &format!("{new}\n{old}\n")));
    until("the new token", || status(control_port, "/v2/nodes", &new).filter(|status| *status == 200));
    until("the new token", || status(agent_port, "/v2/pools", &new).filter(|status| *status == 200));
    some_more("requests with either");
    shown.store(1, Ordering::SeqCst);
    some_more("requests with the new token");
    some_more("requests with the new token");
    write(&files[0], &new);
    until("the old token to go", || status(control_port, "/v2/nodes", &old).filter(|status| *status == 401));
    some_more("requests behind the new token alone");
    write(&files[1], &new);
    agent.signal(Signal::HUP);
    until("the old token to go", || status(agent_port, "/v2/pools", &old).filter(|status| *status == 401));
    some_more("requests behind the new token everywhere");
    over.store(1, Ordering::Relaxed);
    for client in clients {
        client.join().expect("no request failed");
    }
    // The node is one still, with the new token.
    let nodes = ask(control_port, "GET", "/v2/nodes", Some(&new), "").expect("an answer").json();
    assert_eq!(nodes["nodes"][0]["status"], "Online", "{nodes}");
    for log in [control.log(), agent.log()] {
        assert!(!log.contains(&old) && !log.contains(&new), "{log}");
    }
}

#[test]
fn systemds_credentials_serve_and_a_scope_without_a_token_is_an_error() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("llorch-api-token"), "from-systemd\n").expect("written");
    let name = directory.path().to_string_lossy().into_owned();
    let home = Home::start(&[("CREDENTIALS_DIRECTORY", &name)]);
    let status = |token| ask(home.port, "GET", "/v2/pools", token, "").expect("an answer").status;
    assert_eq!((status(None), status(Some("from-systemd"))), (401, 200));
    assert!(home.daemon.log().contains("shorter than the advised"), "{}", home.daemon.log());
    let run = |env: &[(&str, &str)]| {
        let port = free_port().to_string();
        let mut daemon =
            Process::start(ORCHESTRATORD, &["--addr", &format!("127.0.0.1:{port}")], env, directory.path());
        (daemon.end(), daemon.log())
    };
    let (code, log) = run(&[("LLORCH_NODE_TOKEN", "n"), ("LLORCH_CLIENT_TOKEN", "secret-c")]);
    assert!(code == Some(78) && log.contains("no token opens the admin routes"), "{log}");
    assert!(!log.contains("secret-c"), "{log}");
    let (code, log) = run(&[("LLORCH_API_TOKEN_FILE", "/does/not/exist")]);
    assert!(code == Some(78) && log.contains("LLORCH_API_TOKEN_FILE=/does/not/exist"), "{log}");
}

/// Soft and hard limit of a process's core dumps, as the kernel tells them.
fn core_limits(pid: u32) -> [String; 2] {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).expect("a line");
    let mut words = core.split_whitespace().map(str::to_string);
    [(); 2].map(|()| words.next().expect("a limit"))
}

#[test]
fn no_core_is_dumped_of_a_daemon_with_a_token_unless_that_is_asked_for() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    // As below a service manager that lets everything dump core, or as near to it as this process may come.
    let own = getrlimit(Resource::Core);
    if setrlimit(Resource::Core, Rlimit { current: None, maximum: None }).is_err() {
        setrlimit(Resource::Core, Rlimit { current: own.maximum, ..own }).expect("within the limit");
    }
    let inherited = core_limits(std::process::id());
    let directory = tempfile::tempdir().expect("a directory");
    let token = ("LLORCH_API_TOKEN", "good-0123456789abcdef0123456789abcdef");
    let none = ["0", "0"].map(str::to_string);
    let cases = [
        (&[][..], &[][..], &inherited),
        (&[], &[token], &none),
        (&["--core-dumps=true"], &[token], &inherited),
    ];
    for program in [ORCHESTRATORD, POOL_MANAGERD] {
        for (args, env, expected) in &cases {
            let port = free_port();
            let addr = format!("127.0.0.1:{port}");
            let args = [&["--addr", addr.as_str()][..], args].concat();
            let daemon = Process::start(program, &args, env, directory.path());
            until("a daemon", || get(port, "/health").map(|_| ()));
            assert_eq!(&&core_limits(daemon.pid()), expected, "{program} {args:?}");
        }
    }
}

#[test]
fn a_foreign_name_is_refused_and_one_that_was_added_is_not() {
    let token = "good-0123456789abcdef0123456789abcdef";
    let added = [("ORCHESTRATORD_ALLOW_HOSTS", "llm.example")];
    let (plain, named) =
        (Home::start(&[]), Home::start(&[&added[..], &[("LLORCH_API_TOKEN", token)]].concat()));
    let ask = |home: &Home, host: &str, path: &str, fields: &str| {
        let text = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{fields}\r\n");
        send(home.port, &text)
    };
    for host in ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example"] {
        for path in ["/", "/v1/models", "/v2/pools", "/v2/explain", "/no/such/path"] {
            let refused = ask(&plain, host, path, "");
            assert_eq!(refused.status, 421, "{host} {path}");
            assert!(refused.body.contains("ORCHESTRATORD_ALLOW_HOSTS"), "{refused:?}");
            assert_eq!(ask(&named, host, path, &bearer(token)).status, 421, "{host} {path}");
        }
        assert_eq!(ask(&plain, host, "/health", "").status, 200, "{host}: probes know no names");
    }
    let port = plain.port;
    for host in [format!("127.0.0.1:{port}"), "localhost".into(), "LOCALHOST.:80".into(), "[::1]:8080".into()]
    {
        assert_eq!(ask(&plain, &host, "/v1/models", "").status, 200, "{host}");
    }
    assert_eq!(ask(&named, "LLM.Example:443", "/v1/models", &bearer(token)).status, 200);
    assert_eq!(ask(&named, "llm.example", "/v1/models", "").status, 401, "a name is no token");
    assert_eq!(ask(&plain, "llm.example", "/v1/models", "").status, 421);
    let foreign = get(plain.port, "/metrics").expect("metrics").body;
    assert!(foreign.contains("orchestratord_foreign_requests_total{reason=\"host\"} 21"), "{foreign}");
}

#[test]
fn web_pages_of_other_origins_see_nothing_unless_they_are_listed() {
    let listed = [("ORCHESTRATORD_CORS_ORIGINS", "https://chat.example")];
    let (off, on) = (Home::start(&[]), Home::start(&listed));
    let asks = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n";
    let page = |home: &Home, method: &str, origin: &str, fields: &str| {
        send(home.port, &request(method, "/v1/models", &format!("Origin: {origin}\r\n{fields}")))
    };
    let allowed = |answer: &Answer| answer.field("access-control-allow-origin").map(str::to_string);
    let good = page(&on, "OPTIONS", "https://chat.example", asks);
    assert_eq!((good.status, allowed(&good).as_deref()), (204, Some("https://chat.example")));
    assert_eq!(good.field("access-control-allow-headers"), Some("authorization"));
    let read = page(&on, "GET", "https://chat.example", "");
    assert_eq!((read.status, allowed(&read).as_deref()), (200, Some("https://chat.example")));
    for (home, origin) in [(&on, "https://evil.example"), (&off, "https://chat.example"), (&off, "null")] {
        let preflight = page(home, "OPTIONS", origin, asks);
        assert_eq!((preflight.status, allowed(&preflight)), (405, None), "{origin}");
        let read = page(home, "GET", origin, "");
        assert_eq!((read.status, allowed(&read)), (200, None), "{origin}");
        // Not even without being able to read the answer.
        let blind = send(home.port, &request("POST", "/v2/tasks", &format!("Origin: {origin}\r\n")));
        assert_eq!(blind.status, 403, "{origin}: {blind:?}");
    }
    let same = send(off.port, &request("POST", "/v2/tasks", "Origin: http://localhost\r\n"));
    assert_eq!(same.status, 400, "a page of this server's own: {same:?}");
    // An engine's own word on it is not passed on.
    let engine = Engine::start();
    hand_over(&on.engines(), "a.json", &handoff(engine.port, "r0", 1));
    on.until_routable(1.0);
    let body = r#"{"prompt":"x"}"#;
    for (origin, expected) in [("https://chat.example", Some("https://chat.example")), ("", None)] {
        let text = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nOrigin: {origin}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let text = if origin.is_empty() { text.replace("Origin: \r\n", "") } else { text };
        let answer = send(on.port, &text);
        assert_eq!((answer.status, allowed(&answer).as_deref()), (200, expected), "{answer:?}");
        assert_eq!(
            answer.head.to_ascii_lowercase().matches("access-control-allow-origin").count(),
            expected.iter().count()
        );
    }
}

/// An engine that keeps all it is sent.
struct Engine {
    port: u16,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Engine {
    fn start() -> Engine {
        let listener = harness::listen_on_free_port();
        let port = listener.local_addr().expect("an address").port();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let shared = heard.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (heard, stream) = (shared.clone(), stream.expect("a connection"));
                thread::spawn(move || Engine::serve(stream, &heard));
            }
        });
        Engine { port, heard }
    }

    fn serve(mut stream: TcpStream, heard: &Mutex<Vec<String>>) {
        let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
        let mut text = String::new();
        while !text.ends_with("\r\n\r\n") {
            if reader.read_line(&mut text).unwrap_or(0) == 0 {
                return;
            }
        }
        let length = text
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        if reader.read_exact(&mut body).is_err() {
            return;
        }
        text.push_str(&String::from_utf8_lossy(&body));
        heard.lock().expect("nobody panics with it").push(text);
        let body = r#"{"choices":[{"text":"x","finish_reason":"stop"}]}"#;
        let _ = write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nAccess-Control-Allow-Origin: *\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }

    fn prompts(&self) -> Vec<String> {
        let heard = self.heard.lock().expect("nobody panics with it");
        heard.iter().filter(|text| text.starts_with("POST ")).cloned().collect()
    }
}

#[test]
fn engines_are_shown_their_own_key_and_never_a_token_of_ours() {
    let directory = tempfile::tempdir().expect("a directory");
    let [client, node, admin] =
        ["cli", "nod", "adm"].map(|name| format!("{name}-canary-0123456789abcdef01234567"));
    let key_file = directory.path().join("key");
    fs::write(&key_file, "sk-engine-key\n").expect("written");
    let (control_port, agent_port) = (free_port(), free_port());
    let (addr, agent_addr) = (format!("127.0.0.1:{control_port}"), format!("127.0.0.1:{agent_port}"));
    let url = format!("http://{addr}");
    let control = [
        ("ORCHESTRATORD_ADDR", addr.as_str()),
        ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
        ("LLORCH_CLIENT_TOKEN", &client),
        ("LLORCH_NODE_TOKEN", &node),
        ("LLORCH_ADMIN_TOKEN", &admin),
    ];
    let agent = [
        ("POOL_MANAGERD_ADDR", agent_addr.as_str()),
        ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
        ("POOL_MANAGERD_NODE_ID", "n"),
        ("ORCHESTRATORD_URL", &url),
        ("LLORCH_NODE_TOKEN", &node),
        ("LLORCH_ADMIN_TOKEN", &admin),
    ];
    let _control = Process::start(ORCHESTRATORD, &[], &control, directory.path());
    let _agent = Process::start(POOL_MANAGERD, &[], &agent, directory.path());
    let (keyed, open) = (Engine::start(), Engine::start());
    let runtime = directory.path().join(".runtime/engines");
    let text = |port: u16, model: &str, auth: &str| {
        format!(
            r#"{{"pool_id":"{model}","url":"http://127.0.0.1:{port}","slots":2,"model":"{model}"{auth}}}"#
        )
    };
    let auth = format!(r#","auth":{{"file":"{}"}}"#, key_file.display());
    hand_over(&runtime, "keyed.json", &text(keyed.port, "keyed", &auth));
    hand_over(&runtime, "open.json", &text(open.port, "open", ""));
    until("both", || {
        let models = ask(control_port, "GET", "/v1/models", Some(&client), "").filter(|a| a.status == 200)?;
        (models.body.contains("keyed") && models.body.contains("open")).then_some(())
    });
    for (model, engine, key) in
        [("keyed", &keyed, Some("authorization: bearer sk-engine-key")), ("open", &open, None)]
    {
        let body = format!(r#"{{"model":"{model}","prompt":"x"}}"#);
        let fields = format!("{}Cookie: a=b\r\nProxy-Authorization: Basic {client}\r\n", bearer(&client));
        let text = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{fields}Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        until("an answer", || Some(send(control_port, &text)).filter(|answer| answer.status == 200));
        let task = format!(r#"{{"task_id":"{model}","model_ref":"{model}","prompt":"x","max_tokens":2}}"#);
        let created = ask(control_port, "POST", "/v2/tasks", Some(&client), &task).expect("an answer");
        assert!(created.status < 300, "{created:?}");
        until("the task", || (engine.prompts().len() >= 2).then_some(()));
        for prompt in engine.prompts() {
            let head = prompt.to_ascii_lowercase();
            let shown: Vec<&str> = head.lines().filter(|line| line.starts_with("authorization:")).collect();
            assert_eq!(shown, key.into_iter().collect::<Vec<_>>(), "{prompt}");
        }
    }
    for heard in [&keyed, &open].map(|engine| engine.heard.lock().expect("nobody panics with it").join("\n"))
    {
        assert!(!heard.contains("canary"), "{heard}");
    }
}
