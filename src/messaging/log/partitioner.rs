//! Kafka's default partitioner, so that every client's records of one key land in one partition. Imports nothing.

/// Kafka's murmur2: 32 bits, with its fixed seed.
pub fn murmur2(data: &[u8]) -> i32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    const R: u32 = 24;

    // The length is mixed in as a Java int; a longer key than that does not fit into a record anyway.
    let mut h = SEED ^ data.len() as u32;
    let (words, rest) = data.as_chunks();
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k ^= k >> R;
        h = h.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    if !rest.is_empty() {
        h ^= rest.iter().rev().fold(0_u32, |k, byte| k << 8 | u32::from(*byte));
        h = h.wrapping_mul(M);
    }
    h ^= h >> 13;
    h = h.wrapping_mul(M);
    h ^= h >> 15;
    h.cast_signed()
}

/// The partition of `key` in a topic of `partitions`, which must be at least 1.
pub fn partition_of(key: &[u8], partitions: i32) -> i32 {
    (murmur2(key) & i32::MAX) % partitions.max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize)]
    struct Vector {
        key: String,
        murmur2: i32,
        partition_of_1: i32,
        partition_of_3: i32,
        partition_of_12: i32,
        partition_of_64: i32,
    }

    #[test]
    fn keys_land_where_the_java_client_puts_them() {
        let vectors: Vec<Vector> = serde_json::from_str(include_str!("../../../tests/vectors/murmur2.json")).unwrap();
        assert!(vectors.len() >= 10);
        for v in vectors {
            let key = v.key.as_bytes();
            assert_eq!(murmur2(key), v.murmur2, "{}", v.key);
            let expected = [(1, v.partition_of_1), (3, v.partition_of_3), (12, v.partition_of_12), (64, v.partition_of_64)];
            for (partitions, partition) in expected {
                assert_eq!(partition_of(key, partitions), partition, "{} of {partitions}", v.key);
            }
        }
    }

    proptest! {
        #[test]
        fn every_key_has_a_partition_and_keeps_it(key in proptest::collection::vec(any::<u8>(), 0..300), partitions in 1..10_000_i32) {
            let partition = partition_of(&key, partitions);
            prop_assert!((0..partitions).contains(&partition));
            prop_assert_eq!(partition, partition_of(&key, partitions));
        }
    }
}
