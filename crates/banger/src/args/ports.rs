//! The grammar of a vm's ports.

use banger_wire::ports::{CLAIM_PORT, Publish};
use clap::Args;
use std::net::{IpAddr, Ipv4Addr};

/// `banger vm ports`.
#[derive(Debug, Args)]
pub(crate) struct PortsArgs {
    /// Name, id or the beginning of an id.
    #[arg(value_name = "REF", required = true)]
    pub(crate) vms: Vec<String>,
    /// Do not ask the ports whether they speak HTTP.
    #[arg(long)]
    pub(crate) no_probe: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Reads `[ADDR:]HOSTPORT:GUESTPORT`; an IPv6 address is in brackets.
pub(crate) fn parse_publish(text: &str) -> Result<Publish, String> {
    let wrong =
        || "expected `[ADDR:]HOSTPORT:GUESTPORT`, such as `8080:80` or `127.0.0.1:8080:80`".to_owned();
    let (rest, guest) = text.rsplit_once(':').ok_or_else(wrong)?;
    let (address, host) = rest.rsplit_once(':').map_or((None, rest), |(address, host)| (Some(address), host));
    let port = |text: &str| match text.parse() {
        Ok(0) | Err(_) => Err(format!("`{text}` is not a port: {}", wrong())),
        Ok(port) => Ok(port),
    };
    let address = match address {
        None => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Some(text) => {
            let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
            inner.parse().map_err(|_| format!("`{text}` is not an address of this machine: {}", wrong()))?
        }
    };
    let publish = Publish { address, host_port: port(host)?, guest_port: port(guest)? };
    if publish.host_port == CLAIM_PORT {
        return Err(format!("port {CLAIM_PORT} of the host is banger's own"));
    }
    Ok(publish)
}

#[cfg(test)]
mod tests {
    use super::parse_publish;

    #[test]
    fn what_is_published_is_read_or_refused() {
        let read = |text: &str| match parse_publish(text) {
            Ok(publish) => format!("{} {} {}", publish.address, publish.host_port, publish.guest_port),
            Err(error) => error,
        };
        let all = [
            "8080:80",
            "0.0.0.0:8080:80",
            "[::1]:1:65535",
            "80",
            "x:8080:80",
            "0:80",
            "8080:70000",
            "42069:1",
            "",
        ];
        insta::assert_snapshot!(all.map(read).join("\n"), @r"
        127.0.0.1 8080 80
        0.0.0.0 8080 80
        ::1 1 65535
        expected `[ADDR:]HOSTPORT:GUESTPORT`, such as `8080:80` or `127.0.0.1:8080:80`
        `x` is not an address of this machine: expected `[ADDR:]HOSTPORT:GUESTPORT`, such as `8080:80` or `127.0.0.1:8080:80`
        `0` is not a port: expected `[ADDR:]HOSTPORT:GUESTPORT`, such as `8080:80` or `127.0.0.1:8080:80`
        `70000` is not a port: expected `[ADDR:]HOSTPORT:GUESTPORT`, such as `8080:80` or `127.0.0.1:8080:80`
        port 42069 of the host is banger's own
        expected `[ADDR:]HOSTPORT:GUESTPORT`, such as `8080:80` or `127.0.0.1:8080:80`
        ");
    }
}
