//! The client's side of TLS for `ureq`, by which commands ask daemons: the same files, the same meaning, the
//! same words for what is wrong with them.

use std::sync::Arc;

use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig, TlsProvider};

use super::{Files, Identity, client_config, system_roots};
use crate::settings::Setting;

/// What a command believes: [`super::CA_SETTING`].
pub const CA: Setting = super::CA_SETTING;

/// What a command shows: it has no certificate as a server that could stand in.
pub const CERT: Setting = Setting {
    help: "Certificate that https servers are shown if they ask for one",
    ..super::CLIENT_CERT_SETTING
};

/// The key of that.
pub const KEY: Setting = super::CLIENT_KEY_SETTING;

impl Files {
    /// How this process is a client of `https` servers, for `ureq`; read now.
    ///
    /// # Errors
    /// As of [`Files::client`].
    pub fn blocking_client(&self) -> Result<TlsConfig, String> {
        let identity = self.client.as_ref().map(|(cert, key)| Identity::read(cert, key)).transpose()?;
        // What cannot be used is refused here, in words: `ureq` takes it for granted that it can.
        client_config(self.ca.as_ref(), identity.as_ref())?;
        let roots = match &self.ca {
            Some(file) => file.certificates()?,
            None => system_roots()?.certificates()?,
        };
        let roots: Vec<_> = roots.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        let client = match (identity, &self.client) {
            (Some(Identity { chain, .. }), Some((_, key))) => {
                let chain: Vec<_> = chain.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
                let secret = PrivateKey::from_pem(&key.read()?);
                let secret = secret.map_err(|error| key.complain(&error.to_string()))?;
                Some(ClientCert::new_with_certs(&chain, secret))
            }
            _ => None,
        };
        Ok(TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .client_cert(client)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build())
    }
}
