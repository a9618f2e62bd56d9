//! A private CA and blocking TLS sockets for tests.

#![allow(unreachable_pub, dead_code)] // A module of a test; not every test uses all of it.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection};

/// A CA.
pub struct Pki {
    issuer: Issuer<'static, KeyPair>,
    pub ca_pem: String,
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub struct Pair {
    pub cert: String,
    pub key: String,
}

impl Pair {
    /// Writes both into a directory, and tells where they are.
    pub fn save(&self, directory: &Path, name: &str) -> (PathBuf, PathBuf) {
        use std::os::unix::fs::PermissionsExt;
        let (cert, key) = (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
        fs::write(&cert, &self.cert).expect("written");
        fs::write(&key, &self.key).expect("written");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("a mode");
        (cert, key)
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(self.cert.as_bytes()).collect::<Result<_, _>>().expect("PEM")
    }

    fn secret(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(self.key.as_bytes()).expect("a key")
    }
}

impl Pki {
    pub fn new() -> Pki {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "a CA of a test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca_pem = params.self_signed(&key).expect("a certificate").pem();
        Pki { issuer: Issuer::new(params, key), ca_pem }
    }

    /// A certificate for servers and clients, with the first name as its common name.
    pub fn issue(&self, names: &[&str]) -> Pair {
        self.issue_until(names, 2090)
    }

    /// The same, up to the beginning of a year.
    pub fn issue_until(&self, names: &[&str], year: i32) -> Pair {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names.clone()).expect("names");
        params.distinguished_name.push(DnType::CommonName, names[0].clone());
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let cert = params.signed_by(&key, &self.issuer).expect("a certificate");
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca_pem.as_bytes()).expect("PEM")).expect("a root");
        roots
    }

    pub fn client(&self, pair: Option<&Pair>) -> Arc<ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(self.roots());
        let mut config = match pair {
            None => builder.with_no_client_auth(),
            Some(pair) => builder.with_client_auth_cert(pair.chain(), pair.secret()).expect("a pair"),
        };
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    pub fn server(&self, pair: &Pair, wants_certificates: bool) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("versions");
        let builder = if wants_certificates {
            let roots = Arc::new(self.roots());
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            builder.with_client_cert_verifier(verifier.expect("a verifier"))
        } else {
            builder.with_no_client_auth()
        };
        Arc::new(builder.with_single_cert(pair.chain(), pair.secret()).expect("a pair"))
    }
}

/// A socket, in the clear or within TLS. Clones share the connection. Dropped, it says farewell.
pub struct Socket {
    tcp: TcpStream,
    session: Option<Arc<Mutex<Connection>>>,
    /// Bytes of the peer for which the session has no room yet.
    stash: Arc<Mutex<Vec<u8>>>,
    says_farewell: bool,
}

impl Deref for Socket {
    type Target = TcpStream;
    fn deref(&self) -> &TcpStream {
        &self.tcp
    }
}

impl Socket {
    pub fn plain(tcp: TcpStream) -> Socket {
        Socket { tcp, session: None, stash: Arc::default(), says_farewell: false }
    }

    pub fn client(tcp: TcpStream, name: &str, config: &Arc<ClientConfig>) -> Socket {
        let name = ServerName::try_from(name.to_string()).expect("a name");
        let session = ClientConnection::new(config.clone(), name).expect("a session");
        Socket {
            tcp,
            session: Some(Arc::new(Mutex::new(session.into()))),
            stash: Arc::default(),
            says_farewell: true,
        }
    }

    pub fn server(tcp: TcpStream, config: &Arc<ServerConfig>) -> Socket {
        let session = ServerConnection::new(config.clone()).expect("a session");
        Socket {
            tcp,
            session: Some(Arc::new(Mutex::new(session.into()))),
            stash: Arc::default(),
            says_farewell: true,
        }
    }

    fn lock(session: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
        session.lock().expect("no panic in the test")
    }

    /// Completes the handshake.
    pub fn handshake(&self) -> io::Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        while Socket::lock(session).is_handshaking() {
            self.flush_session(session)?;
            if Socket::lock(session).is_handshaking() && !self.receive(session)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.flush_session(session)
    }

    /// The certificate that the peer has shown, in DER.
    pub fn peer_certificate(&self) -> Option<Vec<u8>> {
        let session = self.session.as_ref()?;
        Some(Socket::lock(session).peer_certificates()?.first()?.to_vec())
    }

    /// From now on nothing is said at the end.
    pub fn forget_farewell(&mut self) {
        self.says_farewell = false;
    }

    pub fn try_clone(&self) -> io::Result<Socket> {
        let tcp = self.tcp.try_clone()?;
        Ok(Socket { tcp, session: self.session.clone(), stash: self.stash.clone(), says_farewell: false })
    }

    /// The kernel keeps about so many bytes that were written and are not read.
    pub fn keep_little(&self, bytes: usize) {
        rustix::net::sockopt::set_socket_send_buffer_size(&self.tcp, bytes).expect("a socket option");
    }

    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if let Some(session) = &self.session {
            Socket::lock(session).send_close_notify();
            let _ = self.flush_session(session);
        }
        self.tcp.shutdown(how)
    }

    fn flush_session(&self, session: &Mutex<Connection>) -> io::Result<()> {
        loop {
            let mut out = Vec::new();
            let mut locked = Socket::lock(session);
            while locked.wants_write() {
                locked.write_tls(&mut out)?;
            }
            drop(locked);
            if out.is_empty() {
                return Ok(());
            }
            (&self.tcp).write_all(&out)?;
        }
    }

    /// Takes in what has come, as much as there is room for. Nobody else is kept waiting while this waits
    /// for bytes. False at the end.
    fn receive(&self, session: &Mutex<Connection>) -> io::Result<bool> {
        let mut stash = self.stash.lock().expect("no panic in the test");
        let mut is_open = true;
        if stash.is_empty() {
            let mut buffer = [0; 16 * 1024];
            let length = (&self.tcp).read(&mut buffer)?;
            stash.extend_from_slice(&buffer[..length]);
            is_open = length > 0;
        }
        let mut locked = Socket::lock(session);
        loop {
            let mut rest = &stash[..];
            locked.read_tls(&mut rest)?;
            let used = stash.len() - rest.len();
            stash.drain(..used);
            match locked.process_new_packets() {
                Ok(state) if stash.is_empty() || state.plaintext_bytes_to_read() > 0 => return Ok(is_open),
                Ok(_) => {}
                Err(error) => {
                    drop(locked);
                    let _ = self.flush_session(session);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                }
            }
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &self.session else { return (&self.tcp).read(buffer) };
        loop {
            let read = Socket::lock(session).reader().read(buffer);
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.receive(session)?;
                    self.flush_session(session)?;
                }
                // Tests take it for what it may be: somebody cut the connection.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(io::ErrorKind::ConnectionReset.into());
                }
                other => return other,
            }
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(session) = &self.session else { return (&self.tcp).write(bytes) };
        let length = Socket::lock(session).writer().write(bytes)?;
        self.flush_session(session)?;
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let linger = rustix::net::sockopt::socket_linger(&self.tcp).ok().flatten();
        if let Some(session) = &self.session
            && self.says_farewell
            && linger != Some(Duration::ZERO)
        {
            let _ = self.tcp.set_nonblocking(true);
            Socket::lock(session).send_close_notify();
            let _ = self.flush_session(session);
        }
    }
}
