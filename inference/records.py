"""What a run leaves besides label maps, where asked for: a table of statistics and a manifest."""

from functools import cached_property
from pathlib import Path

from inference.case import Case
from inference.files import one_line
from inference.manifest import Manifest, manifest_line
from inference.phases import PhaseTimer
from inference.provenance import Provenance
from inference.statistics import StatisticsTable


class Records:
    """The table and the manifest of a run; each may be left out.

    Attributes:
        incomplete: a line of the manifest could not be written.

    Args:
        statistics: file of the table.
        manifest: file of the manifest.
        keep: whether a table that is there already keeps its rows; a manifest always does.
        timer: that knows each case's seconds.
        provenance: what makes the label maps.

    Raises:
        ValueError: one of the files cannot be written or is something else; the message names its
            option.
    """

    def __init__(
        self,
        statistics: Path | None,
        manifest: Path | None,
        *,
        keep: bool,
        timer: PhaseTimer,
        provenance: Provenance,
    ) -> None:
        self.timer = timer
        self.provenance = provenance
        self.table = self.manifest = None
        self.incomplete = False
        try:
            option = f"--statistics {statistics}"
            if statistics:
                self.table = StatisticsTable(statistics, keep=keep)
            option = f"--manifest {manifest}"
            if manifest:
                self.manifest = Manifest(manifest)
        except (OSError, ValueError) as error:
            raise ValueError(f"{option}: {one_line(error)}") from error

    @cached_property
    def _in_manifest(self) -> dict[str, dict]:
        return self.manifest.made(self.provenance.made_by)

    def recorded(self, name: str) -> dict | None:
        """Return what the manifest holds of a case's input; None if a record of it is missing."""
        if self.table is not None and name not in self.table:
            return None
        return self._in_manifest.get(name) if self.manifest else {}

    def add(self, case: Case) -> None:
        """Take a case that has ended; what cannot be written becomes one of its warnings."""
        if self.table and case.statistics:
            try:
                self.table.add(case.statistics)
            except (OSError, ValueError) as error:
                case.warnings.append(f"{self.table.path}: {one_line(error)}")
        # A case that was left alone is in the manifest as it ended, of which no more is known now.
        if self.manifest and (case.status != "kept" or case.about):
            try:
                seconds = self.timer.seconds(case.name)
                self.manifest.add(manifest_line(case, self.provenance, seconds))
            except (OSError, ValueError) as error:
                case.warnings.append(f"{self.manifest.path}: {one_line(error)}")
                self.incomplete = True
        case.statistics, case.about, case.sizes = [], {}, None  # of thousands, it adds up

    def close(self) -> None:
        """Write what was held back.

        Raises:
            ValueError: the table cannot be written; the message names its option.
        """
        if self.table:
            try:
                self.table.write()
            except (OSError, ValueError) as error:
                raise ValueError(f"--statistics {self.table.path}: {one_line(error)}") from error
