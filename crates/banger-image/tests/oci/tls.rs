//! A real registry with a certificate of its own.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use banger_image::oci::HostConfig;

use crate::pull::{Place, chain};

/// A child that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn openssl(dir: &Path, arguments: &str) -> bool {
    let mut command = Command::new("openssl");
    command.args(arguments.split(' ')).current_dir(dir).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[tokio::test]
async fn a_certificate_is_trusted_when_the_configuration_says_so() {
    let mut place = Place::new();
    let dir = place.dir.path().to_owned();
    std::fs::write(dir.join("ext"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    let made = openssl(
        &dir,
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca",
    ) && openssl(
        &dir,
        "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=server",
    ) && openssl(
        &dir,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.pem",
    );
    if !made {
        println!("skipped: openssl is not installed");
        return;
    }
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let settings = format!(
        "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {0}/registry}}}}\n\
         http: {{addr: '{address}', tls: {{certificate: {0}/server.pem, key: {0}/server.key}}}}\n",
        dir.display()
    );
    std::fs::write(dir.join("registry.yml"), settings).unwrap();
    let mut command = Command::new("docker-registry");
    command.arg("serve").arg(dir.join("registry.yml")).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(child) = command.spawn() else {
        println!("skipped: docker-registry is not installed");
        return;
    };
    let _running = Running(child);
    for _ in 0..200 {
        if std::net::TcpStream::connect(address).is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let error = chain(&place.pull(&format!("{address}/box")).await.unwrap_err());
    assert!(error.contains("certificate"), "{error}");
    let trusting = HostConfig { ca_file: Some(dir.join("ca.pem")), ..HostConfig::default() };
    place.config.hosts.insert(address.to_string(), trusting);
    let error = chain(&place.pull(&format!("{address}/box")).await.unwrap_err());
    assert!(error.contains("is not in the registry"), "{error}");
    let broken = HostConfig { ca_file: Some(dir.join("ext")), ..HostConfig::default() };
    place.config.hosts.insert(address.to_string(), broken);
    let error = chain(&place.pull(&format!("{address}/box")).await.unwrap_err());
    assert!(error.contains("no certificates in PEM form"), "{error}");
}
