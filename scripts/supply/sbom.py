"""Makes the program's bill of materials of what cargo-cyclonedx found, and holds it against Cargo's own account.

usage: cargo tree -e normal --prefix none -f '{p}' … | sbom.py FOUND WRITTEN

FOUND lists what any build of the package could need: also what only the tests' features bring, and what a crate names under a condition
that is never true. Cargo's tree has what goes into the program. What is in FOUND alone is left out, and named; a crate that FOUND
lacks, or has without licence or checksum, is an error. WRITTEN names no folder of this machine.
"""

import json
import re
import sys


def main(found: str, written: str) -> None:
    tree = set(re.findall(r"^(\S+) v(\S+)", sys.stdin.read(), re.MULTILINE))
    with open(found, encoding="utf-8") as file:
        text = file.read()
    bom = json.loads(text)
    shop = bom["metadata"]["component"]
    if not tree or (shop["name"], shop["version"]) not in tree:
        sys.exit(f"sbom: Cargo's tree is not that of {shop['name']} {shop['version']}")
    tree.remove((shop["name"], shop["version"]))

    bom = json.loads(text.replace(shop["bom-ref"], f"pkg:cargo/{shop['name']}@{shop['version']}"))
    shop = bom["metadata"]["component"]
    shop["purl"] = shop["bom-ref"]

    kept = [one for one in bom["components"] if (one["name"], one["version"]) in tree]
    out = {one["bom-ref"]: one for one in bom["components"] if one not in kept}
    bom["components"] = kept
    bom["dependencies"] = [
        {**one, "dependsOn": [ref for ref in one.get("dependsOn", []) if ref not in out]}
        for one in bom["dependencies"]
        if one["ref"] not in out
    ]

    wrong = [f"{name} {version} is missing" for name, version in tree - {(one["name"], one["version"]) for one in kept}]
    wrong += [f"{one['name']} has no {what}" for one in kept for what in ("licenses", "hashes") if not one.get(what)]
    if len(kept) > len(tree):
        wrong.append("a crate is listed twice")
    if wrong:
        sys.exit("\n".join(f"sbom: {one}" for one in sorted(wrong)))

    with open(written, "w", encoding="utf-8") as file:
        json.dump(bom, file, indent=2)
        file.write("\n")
    print(f"sbom: {written}, {len(kept)} crates as in Cargo's tree", file=sys.stderr)
    if out:
        names = ", ".join(sorted(f"{one['name']} {one['version']}" for one in out.values()))
        print(f"sbom: left out, for the program has nothing of it: {names}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
