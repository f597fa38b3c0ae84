//! What producers compress their batches with. Pure, and bounded: a few bytes may become any number.

use std::io::{Read, Result as IoResult};

use bytes::Buf;

const GZIP: i16 = 1;
const SNAPPY: i16 = 2;
const LZ4: i16 = 3;
const ZSTD: i16 = 4;
/// Java's clients frame what snappy makes: this, two versions, then blocks with their lengths. Others do not.
const XERIAL: &[u8] = b"\x82SNAPPY\0";
const XERIAL_HEAD_BYTES: usize = 16;
/// Of the decompressor's memory: 32 MiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 25;

const MALFORMED: &str = "malformed when decompressed";
const TOO_LARGE: &str = "too large when decompressed";

/// At most `bytes_max` of them. `codec` as a batch's attributes name it.
pub(super) fn decompress(codec: i16, bytes: &[u8], bytes_max: usize) -> Result<Vec<u8>, &'static str> {
    match codec {
        GZIP => read(flate2::read::MultiGzDecoder::new(bytes), bytes.len(), bytes_max),
        SNAPPY => snappy(bytes, bytes_max),
        LZ4 => read(lz4::Decoder::new(bytes).map_err(|_| MALFORMED)?, bytes.len(), bytes_max),
        ZSTD => {
            let decoder = || -> IoResult<_> {
                let mut decoder = zstd::Decoder::with_buffer(bytes)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Ok(decoder)
            };
            read(decoder().map_err(|_| MALFORMED)?, bytes.len(), bytes_max)
        }
        _ => Err("an unknown codec"),
    }
}

fn read(decoder: impl Read, compressed: usize, bytes_max: usize) -> Result<Vec<u8>, &'static str> {
    let mut plain = Vec::with_capacity((compressed * 4).min(bytes_max));
    decoder.take(bytes_max as u64 + 1).read_to_end(&mut plain).map_err(|_| MALFORMED)?;
    if plain.len() > bytes_max { Err(TOO_LARGE) } else { Ok(plain) }
}

fn snappy(bytes: &[u8], bytes_max: usize) -> Result<Vec<u8>, &'static str> {
    let mut plain = Vec::new();
    let Some(mut rest) = bytes.strip_prefix(XERIAL).and_then(|_| bytes.get(XERIAL_HEAD_BYTES..)) else {
        block(bytes, &mut plain, bytes_max)?;
        return Ok(plain);
    };
    while rest.has_remaining() {
        let length = rest.try_get_u32().map_err(|_| MALFORMED)? as usize;
        let (one, others) = rest.split_at_checked(length).ok_or(MALFORMED)?;
        block(one, &mut plain, bytes_max)?;
        rest = others;
    }
    Ok(plain)
}

/// The length that it says comes first, so nothing is made for one that is too large.
fn block(bytes: &[u8], plain: &mut Vec<u8>, bytes_max: usize) -> Result<(), &'static str> {
    let length = snap::raw::decompress_len(bytes).map_err(|_| MALFORMED)?;
    let begin = plain.len();
    if length > bytes_max - begin {
        return Err(TOO_LARGE);
    }
    plain.resize(begin + length, 0);
    let written = snap::raw::Decoder::new().decompress(bytes, &mut plain[begin..]).map_err(|_| MALFORMED)?;
    if written == length { Ok(()) } else { Err(MALFORMED) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = lz4::EncoderBuilder::new().build(Vec::new()).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().0
    }

    fn raw(bytes: &[u8]) -> Vec<u8> {
        snap::raw::Encoder::new().compress_vec(bytes).unwrap()
    }

    fn xerial(bytes: &[u8]) -> Vec<u8> {
        let mut framed = [XERIAL, &[0, 0, 0, 1, 0, 0, 0, 1]].concat();
        for block in bytes.chunks(1_000) {
            let block = raw(block);
            framed.extend((block.len() as u32).to_be_bytes());
            framed.extend(block);
        }
        framed
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 1).unwrap()
    }

    type Compress = fn(&[u8]) -> Vec<u8>;
    const ALL: [(i16, Compress); 5] = [(GZIP, gzip), (SNAPPY, raw), (SNAPPY, xerial), (LZ4, lz4), (ZSTD, zstd)];

    proptest! {
        #[test]
        fn what_any_codec_made_is_read_and_what_was_cut_or_damaged_ends_in_a_value(
            bytes in proptest::collection::vec(0u8..4, 0..5_000), at in any::<prop::sample::Index>(), flip in 1u8..,
        ) {
            for (codec, compress) in ALL {
                let mut compressed = compress(&bytes);
                prop_assert_eq!(decompress(codec, &compressed, 5_000), Ok(bytes.clone()));
                let at = at.index(compressed.len());
                let _ = decompress(codec, &compressed[..at], 5_000);
                compressed[at] ^= flip;
                prop_assert!(decompress(codec, &compressed, 5_000).map_or(true, |plain| plain.len() <= 5_000));
            }
        }
    }

    #[test]
    fn a_few_bytes_that_become_many_are_refused_and_the_bound_itself_is_not() {
        let zeros = vec![0; 1 << 20];
        for (codec, compress) in ALL {
            let compressed = compress(&zeros);
            assert!(compressed.len() < 70_000, "{codec}: {}", compressed.len());
            assert_eq!(decompress(codec, &compressed, zeros.len() - 1), Err(TOO_LARGE), "{codec}");
            assert_eq!(decompress(codec, &compressed, zeros.len()).map(|plain| plain.len()), Ok(zeros.len()), "{codec}");
        }
        assert_eq!(decompress(5, &[], 1), Err("an unknown codec"));
    }
}
