"""All readers of files that are fuzzed, by name."""

import fuzz_checkpoints
import fuzz_reports
import fuzz_tables
import fuzz_texts

ROOMS = (fuzz_tables, fuzz_checkpoints, fuzz_reports, fuzz_texts)
READERS = {reader.name: reader for room in ROOMS for reader in room.READERS}
