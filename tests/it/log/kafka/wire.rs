//! A producer by hand, for records that the client library would not write.

use std::io::Write;
use std::time::Duration;

use bytes::{Buf, BufMut};
use shopd::config::KafkaConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Whether a batch is compressed.
#[derive(Clone, Copy, PartialEq)]
pub enum Codec {
    Plain,
    Gzip,
}

/// Appends one batch of `count` records, value `raw`, to partition 0; each has one header, whose value may be null.
pub async fn produce(config: &KafkaConfig, topic: &str, codec: Codec, count: usize, header: Option<&str>) {
    produce_values(config, topic, codec, &vec![b"raw".as_slice(); count], header).await;
}

/// The same, with these values.
pub async fn produce_values(config: &KafkaConfig, topic: &str, codec: Codec, values: &[&[u8]], header: Option<&str>) {
    let request = request(&format!("{}{topic}", config.topic_prefix), &batch(codec, values, header));
    let exchange = async {
        let mut broker = TcpStream::connect(&config.bootstrap_servers[0]).await.unwrap();
        broker.write_all(&request).await.unwrap();
        let length = broker.read_u32().await.unwrap();
        let mut answer = vec![0; length as usize];
        broker.read_exact(&mut answer).await.unwrap();
        answer
    };
    let answer = tokio::time::timeout(Duration::from_secs(10), exchange).await.unwrap();
    // Correlation id, one topic with its name, one partition with its number: then the error.
    let error = (&answer[4 + 4 + 2 + config.topic_prefix.len() + topic.len() + 4 + 4..]).get_i16();
    assert_eq!(error, 0, "the broker refused the batch");
}

/// Produce, version 3.
fn request(topic: &str, batch: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    body.put_i16(0);
    body.put_i16(3);
    body.put_i32(1);
    put_string(&mut body, "wire");
    body.put_i16(-1); // no transaction
    body.put_i16(-1); // all acknowledgements
    body.put_i32(5_000);
    body.put_i32(1);
    put_string(&mut body, topic);
    body.put_i32(1);
    body.put_i32(0);
    body.put_i32(batch.len() as i32);
    body.put_slice(batch);
    let mut request = Vec::new();
    request.put_i32(body.len() as i32);
    request.put_slice(&body);
    request
}

fn batch(codec: Codec, values: &[&[u8]], header: Option<&str>) -> Vec<u8> {
    let count = values.len();
    let now = chrono::Utc::now().timestamp_millis();
    let mut checked = Vec::new();
    checked.put_i16(if codec == Codec::Gzip { 1 } else { 0 });
    checked.put_i32(count as i32 - 1);
    checked.put_i64(now);
    checked.put_i64(now);
    checked.put_i64(-1); // no producer id, epoch, sequence
    checked.put_i16(-1);
    checked.put_i32(-1);
    checked.put_i32(count as i32);
    let mut records = Vec::new();
    for (index, value) in values.iter().enumerate() {
        let mut record = Vec::new();
        record.put_u8(0);
        put_varint(&mut record, 0);
        put_varint(&mut record, index as i64);
        put_varint(&mut record, -1); // no key
        put_varint(&mut record, value.len() as i64);
        record.put_slice(value);
        put_varint(&mut record, 1);
        put_varint(&mut record, 4);
        record.put_slice(b"name");
        put_varint(&mut record, header.map_or(-1, |value| value.len() as i64));
        record.put_slice(header.unwrap_or_default().as_bytes());
        put_varint(&mut records, record.len() as i64);
        records.put_slice(&record);
    }
    checked.put_slice(&if codec == Codec::Gzip { gzip(&records) } else { records });
    let mut batch = Vec::new();
    batch.put_i64(0);
    batch.put_i32(checked.len() as i32 + 9);
    batch.put_i32(-1);
    batch.put_u8(2);
    batch.put_u32(crc32c::crc32c(&checked));
    batch.put_slice(&checked);
    batch
}

fn put_string(to: &mut Vec<u8>, text: &str) {
    to.put_i16(text.len() as i16);
    to.put_slice(text.as_bytes());
}

fn put_varint(to: &mut Vec<u8>, number: i64) {
    let mut rest = (number << 1 ^ number >> 63).cast_unsigned();
    while rest >= 0x80 {
        to.put_u8((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    to.put_u8(rest as u8);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
