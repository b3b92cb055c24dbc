"""Files of `jaxquant.save` taken apart and put together, with checksums that fit."""

import base64
import json
import struct
import zlib


def parts_of(data):
    """Header without metadata, manifest without structure, structure, and data."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["jaxquant"])
    contents = json.loads(zlib.decompress(base64.b64decode(manifest.pop("tree"))))
    return {"header": header, "manifest": manifest, "contents": contents}, data[8 + length :]


def joined(parts, data):
    """The bytes of a file, with recomputed checksums."""
    tree = base64.b64encode(zlib.compress(json.dumps(parts["contents"]).encode())).decode()
    manifest = parts["manifest"]
    text = json.dumps({**manifest, "tree": tree} if isinstance(manifest, dict) else manifest)
    metadata = {"jaxquant": text, "jaxquant.crc32": str(zlib.crc32(text.encode()))}
    header = parts["header"]
    header = {"__metadata__": metadata, **header} if isinstance(header, dict) else header
    return container(json.dumps(header), data)


def container(header, data=b""):
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data
