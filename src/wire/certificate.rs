//! What a certificate says: whom it names, and until when it holds.
//!
//! Whether it can be trusted is none of this file's business: that has been proved, or is not asked. Only as
//! much of DER and X.509 (RFC 5280) is read as that takes; whatever is not as it should be yields nothing.

/// Most names that are read: a certificate of a node has a few.
const NAMES_MAX: usize = 256;

/// Tags of DER.
const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OBJECT_ID: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;
const EXTENSIONS: u8 = 0xa3;
/// A DNS name among the subject's alternative ones.
const DNS_NAME: u8 = 0x82;
/// A URI among them.
const URI: u8 = 0x86;
/// `id-at-commonName`, 2.5.4.3.
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// `id-ce-subjectAltName`, 2.5.29.17.
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];

/// What is read of a certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Certificate {
    /// The subject's common names and alternative names, DNS names and URIs, each once, as they are written.
    pub names: Vec<String>,
    /// The second of the Unix epoch from which it holds.
    pub not_before_s: i64,
    /// The last second of the Unix epoch in which it holds.
    pub not_after_s: i64,
}

impl Certificate {
    /// Reads a certificate in DER.
    #[must_use]
    pub fn read(der: &[u8]) -> Option<Certificate> {
        let (certificate, _) = expect(der, SEQUENCE)?;
        let (mut rest, _) = expect(certificate, SEQUENCE)?;
        if rest.first() == Some(&VERSION) {
            rest = expect(rest, VERSION)?.1;
        }
        let (_serial, rest) = expect(rest, INTEGER)?;
        let (_algorithm, rest) = expect(rest, SEQUENCE)?;
        let (_issuer, rest) = expect(rest, SEQUENCE)?;
        let (validity, rest) = expect(rest, SEQUENCE)?;
        let (subject, rest) = expect(rest, SEQUENCE)?;
        let (_key, mut rest) = expect(rest, SEQUENCE)?;
        let (not_before_s, after) = time(validity)?;
        let (not_after_s, _) = time(after)?;
        let mut found = Certificate { names: Vec::new(), not_before_s, not_after_s };
        common_names(subject, &mut found.names)?;
        while !rest.is_empty() {
            let (tag, content, after) = element(rest)?;
            if tag == EXTENSIONS {
                alternative_names(content, &mut found.names)?;
            }
            rest = after;
        }
        Some(found)
    }

    /// Whether it was made out to `name`: as a common name, as a DNS name, or as the last part of a URI,
    /// such as `spiffe://cluster/node/NAME`. Letter for letter: a node is not another one in capitals.
    #[must_use]
    pub fn is_of(&self, name: &str) -> bool {
        let last = |written: &str| {
            written.contains(':') && written.rsplit(['/', ':']).next().is_some_and(|last| last == name)
        };
        self.names.iter().any(|written| written == name || last(written))
    }
}

/// The first element of `der`: tag, content, and what follows.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let length = if first < 0x80 {
        usize::from(first)
    } else {
        let digits = usize::from(first & 0x7f);
        // Indefinite lengths are not DER, and nothing here is larger than four digits tell.
        if digits == 0 || digits > 4 || rest.len() < digits {
            return None;
        }
        let (length, after) = rest.split_at(digits);
        rest = after;
        length.iter().fold(0usize, |sum, digit| sum << 8 | usize::from(*digit))
    };
    (rest.len() >= length).then(|| (tag, &rest[..length], &rest[length..]))
}

fn expect(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    element(der).filter(|(found, ..)| *found == tag).map(|(_, content, after)| (content, after))
}

/// A name is a sequence of sets of pairs of an attribute's id and its text.
fn common_names(mut subject: &[u8], names: &mut Vec<String>) -> Option<()> {
    while !subject.is_empty() {
        let (mut set, after) = expect(subject, SET)?;
        subject = after;
        while !set.is_empty() {
            let (attribute, after) = expect(set, SEQUENCE)?;
            set = after;
            let (id, value) = expect(attribute, OBJECT_ID)?;
            let (tag, text, _) = element(value)?;
            if id == COMMON_NAME && matches!(tag, UTF8_STRING | PRINTABLE_STRING | IA5_STRING) {
                add(text, names)?;
            }
        }
    }
    Some(())
}

fn alternative_names(extensions: &[u8], names: &mut Vec<String>) -> Option<()> {
    let (mut extensions, _) = expect(extensions, SEQUENCE)?;
    while !extensions.is_empty() {
        let (extension, after) = expect(extensions, SEQUENCE)?;
        extensions = after;
        let (id, rest) = expect(extension, OBJECT_ID)?;
        if id != SUBJECT_ALT_NAME {
            continue;
        }
        // A boolean may say that the extension is critical.
        let (tag, content, after) = element(rest)?;
        let value = if tag == OCTET_STRING { content } else { expect(after, OCTET_STRING)?.0 };
        let (mut alternatives, _) = expect(value, SEQUENCE)?;
        while !alternatives.is_empty() {
            let (tag, text, after) = element(alternatives)?;
            alternatives = after;
            if matches!(tag, DNS_NAME | URI) {
                add(text, names)?;
            }
        }
    }
    Some(())
}

fn add(text: &[u8], names: &mut Vec<String>) -> Option<()> {
    let name = std::str::from_utf8(text).ok()?;
    if names.len() < NAMES_MAX && names.iter().all(|known| known != name) {
        names.push(name.to_string());
    }
    Some(())
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`, as RFC 5280 wants them.
fn time(der: &[u8]) -> Option<(i64, &[u8])> {
    let (tag, text, after) = element(der)?;
    let digits = text.strip_suffix(b"Z")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |text: &[u8]| text.iter().fold(0i64, |sum, digit| sum * 10 + i64::from(digit - b'0'));
    let (year, rest) = match (tag, digits.len()) {
        (UTC_TIME, 12) => match number(&digits[..2]) {
            year @ 50.. => (1900 + year, &digits[2..]),
            year => (2000 + year, &digits[2..]),
        },
        (GENERALIZED_TIME, 14) => (number(&digits[..4]), &digits[4..]),
        _ => return None,
    };
    let part = |at: usize| number(&rest[at..at + 2]);
    let days = days_since_epoch(year, part(0), part(2))?;
    Some((days * 86_400 + part(4) * 3_600 + part(6) * 60 + part(8), after))
}

/// Days from 1970-01-01 to a day of the Gregorian calendar.
fn days_since_epoch(year: i64, month: i64, day: i64) -> Option<i64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Years that begin in March end with the leap day.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let days_before_month = (153 * month + 2) / 5;
    // 719,468 days lie between the first of March of year 0 and the epoch.
    Some(year * 365 + leap_days + days_before_month + day - 1 - 719_468)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(cn: Option<&str>, sans: &[rcgen::SanType], years: (i32, i32)) -> Vec<u8> {
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "somebody");
        if let Some(cn) = cn {
            params.distinguished_name.push(rcgen::DnType::CommonName, cn);
        }
        params.subject_alt_names = sans.to_vec();
        params.not_before = rcgen::date_time_ymd(years.0, 2, 28);
        params.not_after = rcgen::date_time_ymd(years.1, 3, 1);
        let key = rcgen::KeyPair::generate().expect("a key");
        params.self_signed(&key).expect("a certificate").der().to_vec()
    }

    fn name(text: &str) -> rcgen::string::Ia5String {
        text.try_into().expect("ASCII")
    }

    #[test]
    fn names_and_times_are_read() {
        let sans = [
            rcgen::SanType::DnsName(name("gpu-1.local")),
            rcgen::SanType::IpAddress([127, 0, 0, 1].into()),
            rcgen::SanType::URI(name("spiffe://cluster/node/gpu-1")),
        ];
        let read = Certificate::read(&certificate(Some("Node One"), &sans, (1999, 2060))).expect("readable");
        assert_eq!(read.names, ["Node One", "gpu-1.local", "spiffe://cluster/node/gpu-1"]);
        assert_eq!((read.not_before_s, read.not_after_s), (920_160_000, 2_845_324_800));
        for good in ["gpu-1.local", "gpu-1", "Node One"] {
            assert!(read.is_of(good), "{good}");
        }
        for bad in ["gpu-2", "GPU-1", "gpu-1.loca", "cluster", "node", "", "local"] {
            assert!(!read.is_of(bad), "{bad}");
        }
        let bare = Certificate::read(&certificate(None, &[], (2020, 2030))).expect("readable");
        assert_eq!((bare.names.len(), bare.is_of("")), (0, false));
    }

    #[test]
    fn days_are_counted_as_the_calendar_does() {
        for (date, days) in [
            ((1970, 1, 1), 0),
            ((1969, 12, 31), -1),
            ((2000, 2, 29), 11_016),
            ((2000, 3, 1), 11_017),
            ((2100, 3, 1), 47_541),
            ((2026, 11, 21), 20_778),
        ] {
            assert_eq!(days_since_epoch(date.0, date.1, date.2), Some(days), "{date:?}");
        }
        assert_eq!(days_since_epoch(2026, 13, 1), None);
    }

    proptest::proptest! {
        /// Whatever is cut off or changed, nothing panics, and a name that is found was in the bytes.
        #[test]
        fn broken_certificates_do_no_harm(at in 0usize..400, byte: u8, cut in 0usize..600) {
            let sans = [rcgen::SanType::DnsName(name("gpu-1.local"))];
            let mut der = certificate(Some("n"), &sans, (2020, 2030));
            let index = at % der.len();
            der[index] = byte;
            der.truncate(cut.max(1));
            if let Some(read) = Certificate::read(&der) {
                for name in read.names {
                    let found = der.windows(name.len().max(1)).any(|bytes| bytes == name.as_bytes());
                    proptest::prop_assert!(name.is_empty() || found);
                }
            }
        }
    }
}
