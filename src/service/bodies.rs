//! Limits on request bodies, as every daemon that forwards them reads them from its settings.

use crate::net::Limits;
use crate::net::budget::large_share;
use crate::settings::{Exit, Setting, Settings, number};

/// Largest limit of one body, in MiB: whoever sends more has a file, not a prompt.
const EACH_MIB_MAX: u64 = 1_024;
/// Largest budget of all bodies, in MiB.
const ALL_MIB_MAX: u64 = 65_536;

/// A setting of the largest body.
#[must_use]
pub const fn each_setting(env: &'static str) -> Setting {
    Setting {
        flag: "max-body-mib",
        env,
        aliases: &[],
        default: Some("64"),
        value: "MIB",
        help: "Largest request body; 1 to 1024",
    }
}

/// A setting of the room for all bodies.
#[must_use]
pub const fn all_setting(env: &'static str, help: &'static str) -> Setting {
    Setting { flag: "body-budget-mib", env, aliases: &[], default: Some("256"), value: "MIB", help }
}

/// The limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    /// Largest body, in bytes.
    pub each_bytes: usize,
    /// Room for all of them together, in bytes.
    pub all_bytes: usize,
}

impl BodyLimits {
    /// Reads both settings; `each_env` is the variable of the largest body. A body that could never find room
    /// would be told to come again for ever.
    ///
    /// # Errors
    /// [`Exit`], see [`crate::settings`].
    pub fn read(settings: &Settings, each_env: &str) -> Result<BodyLimits, Exit> {
        let bytes = |mib: u64| usize::try_from(mib << 20).unwrap_or(usize::MAX);
        let each_bytes = bytes(settings.need("max-body-mib", number(1, EACH_MIB_MAX))?);
        let all_bytes = settings.need("body-budget-mib", |text| {
            let mib = number(2, ALL_MIB_MAX)(text)?;
            let least = each_bytes.div_ceil(1 << 20) as u64 * 4;
            match large_share(bytes(mib)) >= each_bytes {
                true => Ok(bytes(mib)),
                false => Err(format!(
                    "three quarters of it are for large bodies, and one of {each_env}={} must fit in; allowed is {} and more",
                    each_bytes >> 20,
                    least.div_ceil(3)
                )),
            }
        })?;
        Ok(BodyLimits { each_bytes, all_bytes })
    }

    /// Puts them into force.
    pub fn apply(self, limits: &mut Limits) {
        limits.body_bytes_max = self.each_bytes;
        limits.bodies_bytes_max = self.all_bytes;
    }
}
