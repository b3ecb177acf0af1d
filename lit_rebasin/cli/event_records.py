"""Values in TensorBoard's event files, each file as far as it is whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DamageError(Exception):
    """Says in words from where on a file cannot be read."""


def event_values(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the steps and the summary values of an event file, in its order.

    Raises:
        DamageError: At the first record that cannot be read, for TensorBoard's own readers silently drop it and all that follow.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader, n_read = PyRecordReader_New(str(file)), 0
    while True:
        try:
            reader.GetNext()
            event = Event.FromString(reader.record())
        except OutOfRangeError:
            return
        except DataLossError as error:
            if "truncated" in str(error):
                raise DamageError(
                    "breaks off within its last record, as of a run that was stopped or goes on"
                ) from None
            raise DamageError(f"is damaged after {n_read} of its records, and no more of it is read") from None
        except DecodeError:
            raise DamageError(f"is damaged after {n_read} of its records, and no more of it is read") from None
        except OSError as error:
            raise DamageError(f"cannot be read ({error.strerror or error})") from None
        n_read += 1
        for value in event.summary.value:
            yield event.step, value
