//! A broker that lets nobody do what it was not told of: users with a password each, and rights by topic.

use std::time::Duration;

use bytes::{Buf, BufMut};
use shopd::config::{KafkaConfig, SaslMechanism, Secret, SecurityProtocol};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::kafka::{self, Broker};
use super::secure::{self, PASSWORD, free_ports};

/// The broker takes what comes through its plain listener for the administrator's.
pub struct GuardedBroker {
    broker: Broker,
    port: u16,
}

/// `User:{user}` may do `operation` with this topic, by the names of `kafka-acls.sh`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acl {
    pub user: String,
    pub operation: String,
    pub topic: String,
}

impl GuardedBroker {
    pub async fn start(users: &[&str]) -> Self {
        let [port] = free_ports();
        let scram: String = users.iter().map(|user| format!("SCRAM-SHA-512=[name={user},password={PASSWORD}]\n")).collect();
        let extra = format!(
            "listeners=PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER@,SASL_PLAINTEXT://127.0.0.1:{port}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:@PORT@,SASL_PLAINTEXT://127.0.0.1:{port}\n\
             listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT\n\
             listener.name.sasl_plaintext.sasl.enabled.mechanisms=SCRAM-SHA-512\n\
             listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config=\
             org.apache.kafka.common.security.scram.ScramLoginModule required;\n\
             authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n\
             super.users=User:ANONYMOUS\n{}",
            kafka::UNHURRIED
        );
        let broker = Broker::prepared(|dir| {
            std::fs::write(dir.join("scram"), scram).expect("a file");
            std::fs::write(dir.join("extra.properties"), extra).expect("a file");
        })
        .await;
        Self { broker, port }
    }

    /// Who may do everything.
    pub fn as_admin(&self, prefix: &str) -> KafkaConfig {
        KafkaConfig { topic_prefix: prefix.to_owned(), ..kafka::config(&self.broker.bootstrap) }
    }

    /// The variables of a role that goes there as this user.
    pub fn variables(&self, user: &str) -> Vec<(String, String)> {
        secure::variables(&KafkaConfig {
            security_protocol: SecurityProtocol::SaslPlaintext,
            sasl_mechanism: SaslMechanism::ScramSha512,
            sasl_username: Some(user.to_owned()),
            sasl_password: Some(Secret::new(PASSWORD)),
            ..kafka::config(&format!("127.0.0.1:{}", self.port))
        })
    }

    /// As the administrator; by the protocol's own words, because its tools are not among the jars.
    pub async fn allow(&self, acls: &[Acl]) {
        let mut request = Vec::new();
        for short in [30, 1] {
            // CreateAcls, version 1.
            request.put_i16(short);
        }
        request.put_i32(7);
        text(&mut request, "test");
        request.put_i32(acls.len() as i32);
        for acl in acls {
            request.put_i8(2); // a topic
            text(&mut request, &acl.topic);
            request.put_i8(3); // by its whole name
            text(&mut request, &format!("User:{}", acl.user));
            text(&mut request, "*");
            request.put_i8(match acl.operation.as_str() {
                "Read" => 3,
                "Write" => 4,
                "Create" => 5,
                "Describe" => 8,
                other => panic!("{other} is no operation of ours"),
            });
            request.put_i8(3); // allowed
        }
        let asked = async {
            let mut stream = TcpStream::connect(&self.broker.bootstrap).await?;
            stream.write_i32(request.len() as i32).await?;
            stream.write_all(&request).await?;
            let mut answer = vec![0; stream.read_i32().await? as usize];
            stream.read_exact(&mut answer).await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = tokio::time::timeout(Duration::from_secs(20), asked).await.expect("an answer in time").expect("an answer");
        let mut answer = answer.as_slice();
        answer.advance(4 + 4);
        let results = answer.get_i32();
        assert_eq!(results, acls.len() as i32);
        for acl in acls {
            assert_eq!(answer.get_i16(), 0, "{acl:?}");
            let message = answer.get_i16().max(0);
            answer.advance(message as usize);
        }
    }
}

fn text(request: &mut Vec<u8>, text: &str) {
    request.put_i16(text.len() as i16);
    request.put_slice(text.as_bytes());
}
