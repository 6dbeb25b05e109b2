"""What a packet's first bytes say: whether decoding may begin at it, and whether any other picture needs it.

Both answers are exact or no: a picture that the standard allows others to refer to is never called spare, and a packet
is an entry only where the standard forbids everything shown after it to refer to what is stored before it. Containers'
own marks (keyframe, disposable) are not believed for the codecs that say it themselves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

#: every picture of these stands alone
INTRA_CODECS = ("mjpeg", "png", "prores", "dnxhd")


@dataclass(slots=True)
class Look:
    """What is known of one packet. The default is the cautious answer."""

    entry: bool = False  #: decoding may begin here: all that is shown at or after it is right
    spare: bool = False  #: no other picture needs it
    shown: bool = True  #: a picture of its own is shown


class Bitstream:
    """Looks at the packets of one stream, in the order in which they are stored."""

    def __init__(self, codec: str, extradata: bytes | None):
        #: False once a packet changes the stream's parameters or holds what is not understood: then no packet but the
        #: first is an entry, since what lies between may matter
        self.steady = True
        #: False once pictures and packets do not go together one by one
        self.plain = True
        #: look(data, is_keyframe) tells of the next packet; `is_keyframe` is what the container says
        self.look: Callable[[memoryview, bool], Look] = _LOOKS[codec](self, bytes(extradata or b""))


def is_known(codec: str) -> bool:
    """Whether there is a `Bitstream` for this codec (FFmpeg's name)."""
    return codec in _LOOKS


class _Nals:
    """Network abstraction layer units of H.264 or HEVC packets, behind lengths or start codes."""

    def __init__(self, length_size: int):
        self._length_size = length_size  #: bytes of a length; 0: start codes

    def of(self, data: memoryview) -> list[tuple[int, int]]:
        """(start, end) of every unit, without its prefix; the last end is beyond the data when the packet is broken."""
        if not self._length_size:
            return list(_start_codes(bytes(data)))
        units, place, end, size = [], 0, len(data), self._length_size
        while place + size < end:
            start = place + size
            place = start + int.from_bytes(data[place:start], "big")
            units.append((start, place))
        return units


def _start_codes(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of what follows each start code 00 00 01."""
    start = data.find(b"\x00\x00\x01")
    while start >= 0:
        following = data.find(b"\x00\x00\x01", start + 3)
        yield start + 3, following if following >= 0 else len(data)
        start = following


def _h264(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    length_size, known = _avc_configuration(extradata)
    nals = _Nals(length_size)
    frames_only = _frames_only(known)
    plain_prefix = length_size == 4

    def look(data: memoryview, is_keyframe: bool) -> Look:
        nonlocal known, frames_only
        if plain_prefix and len(data) > 4:
            # Nearly every packet is one slice behind one length of four bytes.
            kind = data[4]
            if kind & 31 == 1 and int.from_bytes(data[:4], "big") + 4 == len(data):
                return Look(spare=frames_only and not kind & 0x60)
        slices = idr_slices = 0
        spare, sets = True, set()
        for start, end in nals.of(data):
            if start >= len(data) or end > len(data):
                return _broken(stream)
            kind = data[start] & 31
            if kind == 1:
                slices += 1
                spare = spare and not data[start] & 0x60
            elif kind == 5:
                slices += 1
                idr_slices += 1
                spare = False
            elif kind in (7, 8):
                sets.add(bytes(data[start:end]).rstrip(b"\x00"))
                spare = False
            elif kind not in (6, 9, 12):  # supplemental information, delimiters and filling
                spare = False
                stream.steady = stream.steady and kind not in (2, 3, 4, 13, 15, 19, 20)
        if sets:
            if not known:
                known = sets
                frames_only = _frames_only(sets)
            elif not sets <= known:
                stream.steady = False
                frames_only = frames_only and _frames_only(known | sets)
        # One field of a picture may lie in another packet, so where there may be fields none is spare.
        return Look(entry=0 < idr_slices == slices, spare=spare and slices > 0 and frames_only)

    return look


def _hevc(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    length_size, known = _hevc_configuration(extradata)
    nals = _Nals(length_size)
    one_layer = _one_layer(known)

    def look(data: memoryview, is_keyframe: bool) -> Look:
        nonlocal known, one_layer
        slices = random_access = 0
        spare, sets = True, set()
        for start, end in nals.of(data):
            if start + 1 >= len(data) or end > len(data):
                return _broken(stream)
            kind, layer = data[start] >> 1 & 63, (data[start] & 1) << 5 | data[start + 1] >> 3
            if layer:
                spare, stream.steady = False, False
            elif kind < 32:
                slices += 1
                random_access += 16 <= kind <= 21
                # Even kinds below 16 are not referred to by pictures of their own temporal layer.
                spare = spare and kind < 16 and not kind & 1
            elif kind in (32, 33, 34):
                sets.add(bytes(data[start:end]).rstrip(b"\x00"))
                spare = False
            elif kind not in (35, 38, 39, 40):
                spare = False
        if sets:
            if not known:
                known = sets
                one_layer = _one_layer(sets)
            elif not sets <= known:
                stream.steady = False
                one_layer = one_layer and _one_layer(known | sets)
        return Look(entry=0 < random_access == slices, spare=spare and slices > 0 and one_layer)

    return look


def _mpeg12(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    def look(data: memoryview, is_keyframe: bool) -> Look:
        kinds, whole, headers = [], True, False
        packet = bytes(data)
        for start, end in _start_codes(packet):
            code = packet[start]
            if code == 0x00 and start + 2 < end:
                kinds.append(packet[start + 2] >> 3 & 7)
            elif code == 0xB5 and start + 3 < end and packet[start + 1] >> 4 == 8:
                whole = whole and packet[start + 3] & 3 == 3  # a frame, not one field of it
            elif code == 0xB3:
                headers = True
        # A sequence header sets anew whatever was sent before it, the matrices too.
        return Look(
            entry=headers and bool(kinds) and kinds[0] == 1,
            spare=bool(kinds) and whole and not headers and all(kind == 3 for kind in kinds),
        )

    return look


def _mpeg4(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    known = {extradata[start:end] for start, end in _start_codes(extradata) if 0x20 <= extradata[start] <= 0x2F}

    def look(data: memoryview, is_keyframe: bool) -> Look:
        kinds = []
        packet = bytes(data)
        for start, end in _start_codes(packet):
            code = packet[start]
            if code == 0xB6 and start + 1 < end:
                kinds.append(packet[start + 1] >> 6)
            elif 0x20 <= code <= 0x2F:
                stream.steady = stream.steady and packet[start:end] in known
        # DivX packed two pictures into one packet and none into the next.
        stream.plain = stream.plain and len(kinds) == 1
        return Look(entry=kinds == [0], spare=kinds == [2])

    return look


def _vp8(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    return lambda data, is_keyframe: Look(entry=not data[0] & 1, shown=bool(data[0] & 0x10))


def _vp9(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    def look(data: memoryview, is_keyframe: bool) -> Look:
        # Frame marker 2 bits, profile 2 bits (and a reserved one in profile 3), show_existing_frame, frame_type.
        place = 3 if data[0] >> 4 & 3 != 3 else 2
        existing, inter = data[0] >> place & 1, data[0] >> place - 1 & 1
        return Look(entry=is_keyframe and not existing and not inter)

    return look


def _marked(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    return lambda data, is_keyframe: Look(entry=is_keyframe)


def _intra(stream: Bitstream, extradata: bytes) -> Callable[[memoryview, bool], Look]:
    return lambda data, is_keyframe: Look(entry=True, spare=True)


#: codec → what looks at its packets. AV1 is taken by the container's marks, which the reader checks on the pictures.
_LOOKS: dict[str, Callable[[Bitstream, bytes], Callable[[memoryview, bool], Look]]] = {
    "h264": _h264,
    "hevc": _hevc,
    "mpeg1video": _mpeg12,
    "mpeg2video": _mpeg12,
    "mpeg4": _mpeg4,
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _marked,
    "libdav1d": _marked,
} | dict.fromkeys(INTRA_CODECS, _intra)


def _broken(stream: Bitstream) -> Look:
    stream.steady = False
    return Look()


def _avc_configuration(extradata: bytes) -> tuple[int, set[bytes]]:
    """Bytes of a length (0: start codes) and the parameter sets."""
    if not extradata[:1] == b"\x01" or len(extradata) < 7:
        return 0, {extradata[s:e].rstrip(b"\x00") for s, e in _start_codes(extradata) if extradata[s] & 31 in (7, 8)}
    sets, place = set(), 5
    for mask in (31, 255):
        count, place = extradata[place : place + 1], place + 1
        for _ in range(count[0] & mask if count else 0):
            end = place + 2 + int.from_bytes(extradata[place : place + 2], "big")
            sets.add(extradata[place + 2 : end].rstrip(b"\x00"))
            place = end
    return (extradata[4] & 3) + 1, sets


def _hevc_configuration(extradata: bytes) -> tuple[int, set[bytes]]:
    """Bytes of a length (0: start codes) and the parameter sets."""
    if len(extradata) < 23 or extradata[:3] in (b"\x00\x00\x00", b"\x00\x00\x01"):
        kinds = [(s, e) for s, e in _start_codes(extradata) if extradata[s] >> 1 & 63 in (32, 33, 34)]
        return 0, {extradata[s:e].rstrip(b"\x00") for s, e in kinds}
    sets, place = set(), 23
    for _ in range(extradata[22]):
        kind, count, place = extradata[place : place + 1], extradata[place + 1 : place + 3], place + 3
        for _ in range(int.from_bytes(count, "big")):
            if place >= len(extradata):
                break
            end = place + 2 + int.from_bytes(extradata[place : place + 2], "big")
            if kind and kind[0] & 63 in (32, 33, 34):
                sets.add(extradata[place + 2 : end].rstrip(b"\x00"))
            place = end
    return (extradata[21] & 3) + 1, sets


def _one_layer(sets: set[bytes]) -> bool:
    """Whether every HEVC sequence has one temporal layer."""
    counts = [unit[2] >> 1 & 7 for unit in sets if len(unit) > 2 and unit[0] >> 1 & 63 == 33]
    return bool(counts) and not any(counts)


def _frames_only(sets: set[bytes]) -> bool:
    """Whether every H.264 sequence is made of whole frames (`frame_mbs_only_flag`)."""
    sequences = [unit for unit in sets if unit and unit[0] & 31 == 7]
    return bool(sequences) and all(_has_frames_only(unit) for unit in sequences)


def _has_frames_only(unit: bytes) -> bool:
    """`frame_mbs_only_flag` of a sequence parameter set; False when it cannot be read."""
    bits = _Bits(unit[1:].replace(b"\x00\x00\x03", b"\x00\x00"))
    try:
        profile = bits.take(8)
        bits.take(16)
        bits.golomb()
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            chroma = bits.golomb()
            if chroma == 3:
                bits.take(1)
            bits.golomb()
            bits.golomb()
            bits.take(1)
            if bits.take(1):
                for number in range(8 if chroma != 3 else 12):
                    if bits.take(1):
                        bits.scaling_list(16 if number < 6 else 64)
        bits.golomb()
        order = bits.golomb()
        if order == 0:
            bits.golomb()
        elif order == 1:
            bits.take(1)
            bits.golomb()
            bits.golomb()
            for _ in range(min(bits.golomb(), 255)):
                bits.golomb()
        bits.golomb()
        bits.take(1)
        bits.golomb()
        bits.golomb()
        return bits.take(1) == 1
    except EOFError:
        return False


class _Bits:
    """Bits of a parameter set; EOFError at its end."""

    def __init__(self, data: bytes):
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        if count > self._left:
            raise EOFError
        self._left -= count
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """An Exp-Golomb code; signed ones are not needed by value."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)

    def scaling_list(self, size: int) -> None:
        last = following = 8
        for _ in range(size):
            if following:
                code = self.golomb()
                following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
            last = following or last
