"""The one form in which data reaches the model: a microbatch of packed rows.

Shape suffixes: R rows, T tokens of the longest row, F frames of the row with most frames,
N frames of the whole microbatch (no padding frames), C colour channels, H, W pixels.
"""

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

from moss_train.streams.compiled import IGNORED_LABEL


@dataclass(frozen=True)
class FrameShare:
    """Which of `ranks` contiguous shares of a microbatch's frames a process decodes and encodes.

    Raises ValueError when there is no such share.
    """

    rank: int | None = 0  #: None: it holds no frame
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1 or not (self.rank is None or 0 <= self.rank < self.ranks):
            raise ValueError(f"frame share {self.rank} does not exist among {self.ranks}")

    def bounds(self, frames: int) -> tuple[int, ...]:
        """Where the shares of `frames` frames begin, and the end: share k holds [bounds[k], bounds[k + 1])."""
        return tuple(k * frames // self.ranks for k in range(self.ranks + 1))

    def of(self, bounds: tuple[int, ...]) -> tuple[int, int]:
        """First frame and end of this process's share; (0, 0) when it has none."""
        return (0, 0) if self.rank is None else (bounds[self.rank], bounds[self.rank + 1])


def plain_places(positions_RT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Those fields of a `Batch` that only options fill: shared positions, no text window, no contrasts."""
    zeros_RT = torch.zeros_like(positions_RT, dtype=torch.int32)
    return {
        "cross_positions_RT": positions_RT,
        "contrasts_RT": torch.full_like(positions_RT, -1),
        "text_lo_RT": zeros_RT,
        "text_sink_lo_RT": zeros_RT,
        "text_sink_hi_RT": zeros_RT,
    }


ALL_FRAMES = FrameShare()  #: the share of a process that decodes and encodes every frame itself


@dataclass
class Batch:
    """One microbatch. Rows are padded on the right; padding has segment -1, label -100 and sees no frame.

    Frame indices in `visible_*` and `sink_*` count the frames of the row (not of the stream), so a token
    of the second stream of a packed row starts at the first frame of that stream.
    A token sees frame f of its row iff `visible_lo <= f < visible_hi` or
    `sink_lo <= f < sink_hi`; `sink_hi <= visible_hi` always, so no future frame is a sink.
    Of the tokens of its stream, token t sees token u of the row iff `text_lo <= u <= t` or
    `text_sink_lo <= u < text_sink_hi`; `text_sink_hi <= text_lo` always.
    """

    ids_RT: torch.Tensor  #: int64
    labels_RT: torch.Tensor  #: int64, already shifted: what position t predicts; -100 = not trained
    kinds_RT: torch.Tensor  #: uint8, `streams.compiled.Kind`
    weights_RT: torch.Tensor  #: float32, the compiler policy's factor
    positions_RT: torch.Tensor  #: int64, restart at 0 for every stream
    cross_positions_RT: torch.Tensor  #: int64, of the cross-attention's queries, on the axis of `frame_positions_RF`
    contrasts_RT: torch.Tensor  #: int64, a token that should be less probable here than the label; -1 = none
    segments_RT: torch.Tensor  #: int32, which stream of the row a token belongs to; -1 = padding
    visible_lo_RT: torch.Tensor  #: int32
    visible_hi_RT: torch.Tensor  #: int32
    sink_lo_RT: torch.Tensor  #: int32
    sink_hi_RT: torch.Tensor  #: int32
    text_lo_RT: torch.Tensor  #: int32
    text_sink_lo_RT: torch.Tensor  #: int32
    text_sink_hi_RT: torch.Tensor  #: int32
    origins_RT: (
        torch.Tensor
    )  #: int64, number of the source in the blend that a token comes from; -1 = padding or unknown
    frames_NCHW: torch.Tensor  #: uint8 RGB (normalised in the vision tower), or float, already normalised; see bounds
    frame_rows_N: torch.Tensor  #: int64, the row of each frame
    frame_slots_N: torch.Tensor  #: int64, its index f within the row
    frame_positions_RF: torch.Tensor  #: int64, rotary position of each frame; 0 where padded
    frame_counts_R: torch.Tensor  #: int64, real frames of each row
    #: Where the shares of the N frames begin, and N. `frames_NCHW` holds the frames of this process's share alone, all
    #: else describes all N. () when `frames_NCHW` holds all of them.
    frame_bounds: tuple[int, ...] = ()
    trained_K: torch.Tensor | None = None  #: `trained_places`, where they were found on the host
    keys: tuple[tuple[str, ...], ...] = ()  #: per row, the keys of its streams
    sources: tuple[tuple[str, ...], ...] = ()  #: per row, the source of each stream

    @property
    def rows(self) -> int:
        return self.ids_RT.shape[0]

    @property
    def frames(self) -> int:
        """N: frames of the whole microbatch, on whichever process they are."""
        return self.frame_rows_N.shape[0]

    def share(self, share: FrameShare) -> "Batch":
        """The same microbatch with the frames of one share alone; this one must hold all frames."""
        if self.frame_bounds:
            raise ValueError("this batch holds one share of its frames already")
        bounds = share.bounds(self.frames)
        first, end = share.of(bounds)
        return replace(self, frames_NCHW=self.frames_NCHW[first:end], frame_bounds=bounds)

    def trained_RT(self) -> torch.Tensor:
        """Bool [R, T]: positions with a label that is trained, not -100 and with a positive weight."""
        return (self.labels_RT != IGNORED_LABEL) & (self.weights_RT > 0)

    def trained_places(self) -> torch.Tensor:
        """int64 [K], ascending: the flat token index t * R + r of every position with a label that is trained. To find
        them on a device the host waits for it: `counted` finds them before."""
        return self.trained_RT().T.flatten().nonzero()[:, 0] if self.trained_K is None else self.trained_K

    def counted(self) -> "Batch":
        """The same microbatch with `trained_K`, which padding leaves as they are; labels and weights must too."""
        return replace(self, trained_K=self.trained_places())

    def padded(self, multiple: int) -> "Batch":
        """The same microbatch with padding tokens up to a multiple of `multiple` tokens a row."""
        room = -self.ids_RT.shape[1] % multiple
        if not room:
            return self
        fill = {"labels_RT": IGNORED_LABEL, "segments_RT": -1, "origins_RT": -1, "contrasts_RT": -1}
        names = [field.name for field in fields(self) if field.name.endswith("_RT")]
        return replace(self, **{name: F.pad(getattr(self, name), (0, room), value=fill.get(name, 0)) for name in names})

    def to(self, device: torch.device | str, frames: bool = True) -> "Batch":
        """The same batch with every tensor on `device`; with `frames` False the pixels stay where they are."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor) and (frames or f.name != "frames_NCHW")
        }
        return replace(self, **moved)
