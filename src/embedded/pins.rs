//! The archives that may be fetched, and what they must be.

/// One server version, with the SHA-256 of its archive by operating system and architecture, as Rust names them.
pub(super) struct Pinned {
    pub major: u32,
    pub version: &'static str,
    pub sha256: [(&'static str, &'static str, &'static str); 4],
}

impl Pinned {
    /// `None`: there is no build for this machine.
    pub fn sha256(&self, os: &str, arch: &str) -> Option<&'static str> {
        self.sha256.iter().find(|(its_os, its_arch, _)| (*its_os, *its_arch) == (os, arch)).map(|(_, _, sum)| *sum)
    }
}

/// The first is for new data directories, the others for those that an older server made.
pub(super) const PINNED: [Pinned; 4] = [
    Pinned {
        major: 18,
        version: "18.4.0",
        sha256: [
            ("linux", "x86_64", "401d4e69baba9072d3772607710df0d47b39a7632c6b01b2a5f5d85a9514e212"),
            ("linux", "aarch64", "a9ec284923b9a7d2db41509bfb88c3d0eeb9f4aa5e2b29ea0aac5e8dbaf4c335"),
            ("macos", "x86_64", "68381ed1488edd337345c6c4bc6ae0c823832a4dd7af8b04656ee5c218c291b5"),
            ("macos", "aarch64", "ab698c4486a795d2aa8a158b3a41e1201a77e7ff72a6255094cd5900080853c2"),
        ],
    },
    Pinned {
        major: 17,
        version: "17.11.0",
        sha256: [
            ("linux", "x86_64", "0dd7b72b6f335b8ecfb355fa24c5781e8a93edd09880bb77eb52ebbf29b3e96d"),
            ("linux", "aarch64", "8b042e0ea418b1927d95399207950da0734d27fe01e29503ade3bdc464ad4c2b"),
            ("macos", "x86_64", "d464ff178e9860ba204662ac23fa547504b7fd392392ff2fb92e3fd73b5bdb64"),
            ("macos", "aarch64", "a1c2786acb0c398f9b2d76806fc52f5dc8b222cbc8e9383a9b9702084daaf3a5"),
        ],
    },
    Pinned {
        major: 16,
        version: "16.15.0",
        sha256: [
            ("linux", "x86_64", "653abc065c682b85d3da50168fb95dc524bd85426cdec9ce3695a550ef431df2"),
            ("linux", "aarch64", "f846a9989d686b7977d6eca9bc9d8b2b69e3f70c7eb60e032197d9c574a6136c"),
            ("macos", "x86_64", "1229188b99515d2160d5cb6222bc96d9c5f3a248268df3bc2dfe0047e6c233d8"),
            ("macos", "aarch64", "65b953905f0a4d46030767a6b44a52360170d69a7985f1b02aa435f2f6256a83"),
        ],
    },
    Pinned {
        major: 15,
        version: "15.19.0",
        sha256: [
            ("linux", "x86_64", "95f0b66fe72d4ca66c815773c44cb1196ea38552463e89a35f18114b3ed1565f"),
            ("linux", "aarch64", "95baf4bd4af31b91b3050118df59388ed0064756b556b850669e0300aa7b9911"),
            ("macos", "x86_64", "11d0a55e26f4c74c6ea6c72c5e4e6ac959b29a06cc6da5e5ac8162f9fd9f8055"),
            ("macos", "aarch64", "9bfc44d3f50298bb14fa125da4b67a36f382f8134ab2fc95349b72bcd5ec4e87"),
        ],
    },
];
