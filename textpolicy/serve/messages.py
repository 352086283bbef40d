"""The protobuf messages of the Tinker API, and what is read from and written into them.

The messages are made from the table below, in a pool of their own: a server needs no SDK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from .._system.extras import extra
from ..errors import UserError
from ..serving import Alternatives, Datum, Passed, Read, Sampled

PACKAGE = "tinker_public"
INSTALL = "textpolicy[mlx]"  # protobuf comes with mlx-lm
FLOAT32, INT64 = 1, 2
_DTYPES = {1: "<f4", 2: "<i8", 3: "<i4"}
# number, name, type; *: a list, ?: optional, |name: one of a group, {}: a map from text. Of tinker 0.38.
SCHEMA = """
enum StopReason
  0 STOP_REASON_STOP
  1 STOP_REASON_LENGTH
enum DType
  0 DTYPE_UNSPECIFIED
  1 DTYPE_FLOAT32
  2 DTYPE_INT64
  3 DTYPE_INT32
  4 DTYPE_BFLOAT16
message SampleResponse
  1 sequences SampledSequence*
  2 prompt_logprobs bytes?
  3 topk_prompt_logprobs TopkLogprobs?
  4 prompt_cache_hit_tokens int32
  5 target_prompt_logprobs Tensor?
  6 prompt_alt_tokens PromptAltTokens?
message PromptAltTokens
  1 tokens Tensor
  2 logprobs Tensor
message SampledSequence
  1 stop_reason StopReason
  2 tokens bytes
  3 logprobs bytes?
  4 topk_sampled_logprobs TopkLogprobs?
message TopkLogprobs
  1 token_ids bytes
  2 logprobs bytes
  3 k uint32
  4 length uint32
message SparseCsr
  1 values bytes
  2 crow_indices bytes
  3 col_indices bytes
message Tensor
  1 dense bytes|encoding
  2 sparse_csr SparseCsr|encoding
  3 dtype DType
  4 shape int64*
message BatchedTensor
  1 data bytes
  2 offsets bytes
  3 dtype DType
  4 trailing_shape int64*
message ArrayRecord
  1 type_tag string
  2 fields BatchedTensor{}
  3 num_datums int64
message ForwardBackwardOutput
  1 loss_fn_output_type string
  2 loss_fn_outputs ArrayRecord*
  3 metrics double{}
message ForwardBackwardRequest
  1 model_id string
  2 seq_id int32
  3 data Datum*
  4 loss_fn string
  5 loss_fn_config double{}
  6 forward_only bool
  7 loss_fn_config_v2 LossConfigValue{}
message LossConfigValue
  1 number double|value
  2 text string|value
message Datum
  1 model_input Chunk*
  2 loss_fn_inputs Tensor{}
  3 model_input_spans ProvenanceSpan*
  4 loss_fn_input_spans ProvenanceSpan*
message ProvenanceSpan
  1 prompt_tokens PromptProvenanceSpan|span
  2 sampled_tokens SampledProvenanceSpan|span
message PromptProvenanceSpan
  1 sequence_id string
  2 offset int64
  3 length int64
message SampledProvenanceSpan
  1 sequence_id string
  2 offset int64
  3 length int64
message Chunk
  1 encoded_text EncodedTextChunk|chunk
  2 image ImageChunk|chunk
  3 dmel DmelChunk|chunk
message EncodedTextChunk
  1 tokens bytes
message ImageChunk
  1 data bytes
  2 format string
  3 expected_tokens int32?
  4 override_dimensions ImageDimensions?
message ImageDimensions
  1 width uint32
  2 height uint32
message DmelChunk
  1 dmel bytes
"""


@dataclass(frozen=True, slots=True)
class Pass:
    """The request for a pass over data."""

    data: Sequence[Datum]
    loss: str
    config: Mapping[str, float | str]
    backward: bool


def file_descriptor() -> Any:
    """Return the FileDescriptorProto of ``SCHEMA``."""
    proto = extra("google.protobuf.descriptor_pb2", INSTALL)
    field = proto.FieldDescriptorProto
    file = proto.FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto3")
    enums = {line.split()[1] for line in SCHEMA.splitlines() if line.startswith("enum ")}

    def typed(target: Any, kind: str) -> None:
        if kind.islower():
            target.type = field.Type.Value(f"TYPE_{kind.upper()}")
        else:
            target.type = field.TYPE_ENUM if kind in enums else field.TYPE_MESSAGE
            target.type_name = f".{PACKAGE}.{kind}"

    for line in SCHEMA.strip().splitlines():
        words = line.split()
        if words[0] == "enum":
            current = file.enum_type.add(name=words[1])
        elif words[0] == "message":
            current = file.message_type.add(name=words[1])
        elif len(words) == 2:
            current.value.add(name=words[1], number=int(words[0]))
        else:
            number, name, kind = int(words[0]), words[1], words[2]
            kind, _, group = kind.partition("|")
            label = field.LABEL_REPEATED if kind[-1] in "*}" else field.LABEL_OPTIONAL
            made = current.field.add(name=name, number=number, label=label)
            if kind.endswith("{}"):
                entry = current.nested_type.add(name="".join(map(str.capitalize, name.split("_"))) + "Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
                typed(entry.field.add(name="value", number=2, label=field.LABEL_OPTIONAL), kind[:-2])
                made.type, made.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{current.name}.{entry.name}"
                continue
            if group or kind.endswith("?"):
                groups = [g.name for g in current.oneof_decl]
                group = group or f"_{name}"
                if group not in groups:
                    current.oneof_decl.add(name=group)
                    groups.append(group)
                made.oneof_index = groups.index(group)
                if kind.endswith("?"):
                    made.proto3_optional = True
            typed(made, kind.rstrip("*?"))
    return file


@cache
def _messages() -> Mapping[str, Any]:
    """Return the classes of the messages, by name."""
    pools, factory = (extra(f"google.protobuf.{name}", INSTALL) for name in ("descriptor_pool", "message_factory"))
    pool, file = pools.DescriptorPool(), file_descriptor()
    pool.Add(file)
    return {
        m.name: factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{m.name}")) for m in file.message_type
    }


# ---- what clients send


def parsed_pass(body: bytes) -> Any:
    """Return the ForwardBackwardRequest in ``body``. Raises UserError for a body that is none."""
    request = _messages()["ForwardBackwardRequest"]()
    try:
        request.ParseFromString(body)
    except extra("google.protobuf.message", INSTALL).DecodeError as error:
        raise UserError(
            "the body of forward_backward is no ForwardBackwardRequest in protobuf; use the Tinker SDK from 0.25 on"
        ) from error
    return request


def read_pass(request: Any) -> Pass:
    """Return the pass that a ForwardBackwardRequest asks for. Raises UserError for data that cannot be."""
    config: dict[str, float | str] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if (given := value.WhichOneof("value")) is not None:
            config[name] = getattr(value, given)
    data = [_datum(datum, i) for i, datum in enumerate(request.data)]
    return Pass(data, request.loss_fn, config, not request.forward_only)


def _datum(datum: Any, place: int) -> Datum:
    """Return the arrays of a Datum. Raises UserError, which names it by its ``place`` in the request."""
    kinds = {chunk.WhichOneof("chunk") for chunk in datum.model_input}
    if other := kinds - {"encoded_text"}:
        named = "an image" if "image" in other else "audio" if "dmel" in other else "nothing"
        raise UserError(f"datum {place} has a chunk that is {named}; this server reads text alone: send encoded_text")
    parts = [chunk.encoded_text.tokens for chunk in datum.model_input]
    if any(len(part) % 4 for part in parts):
        raise UserError(
            f"datum {place} has tokens of {sum(map(len, parts))} bytes; send them as int32, four bytes each"
        )
    tokens = np.frombuffer(b"".join(parts), "<i4")
    inputs = {name: _array(tensor, f"{name} of datum {place}") for name, tensor in datum.loss_fn_inputs.items()}
    return Datum(tokens, inputs)


def _array(tensor: Any, what: str) -> np.ndarray:
    """Return a Tensor as an array; a sparse one has zeros where nothing is given. Raises UserError."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise UserError(f"the type of {what} is {tensor.dtype}; send float32 or int64")
    shape = tuple(tensor.shape)
    try:
        if tensor.WhichOneof("encoding") != "sparse_csr":
            flat = np.frombuffer(tensor.dense, dtype)
            return flat.reshape(shape) if shape else flat
        values = np.frombuffer(tensor.sparse_csr.values, dtype)
        ends, columns = (np.frombuffer(getattr(tensor.sparse_csr, n), "<i8") for n in ("crow_indices", "col_indices"))
        dense = np.zeros(shape, dtype)
        if len(ends) != shape[0] + 1 or ends[0] != 0 or ends[-1] != len(values) or (columns < 0).any():
            raise ValueError("its rows do not fit its values")
        dense[np.repeat(np.arange(shape[0]), np.diff(ends)), columns] = values
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{what} is no array of shape {shape} ({error}); send as many values as the shape has"
        ) from error
    return dense


def read_json_tensor(given: Any, what: str) -> np.ndarray:
    """Return a tensor that JSON holds as data, dtype and shape, and perhaps as CSR; cells left out are -1.

    Raises UserError.
    """
    try:
        dtype = {"int64": np.int64, "float32": np.float32}[given["dtype"]]
        values = np.asarray(given["data"], dtype)
        shape = tuple(given.get("shape") or values.shape)
        if given.get("sparse_crow_indices") is None:
            return values.reshape(shape)
        dense = np.full(shape, -1, dtype)
        rows = np.repeat(np.arange(shape[0]), np.diff(given["sparse_crow_indices"]))
        dense[rows, given["sparse_col_indices"]] = values
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{what} cannot be read ({error!r:.80}); send data, dtype and shape that fit together"
        ) from error
    return dense


# ---- what they get


def write_passed(passed: Passed) -> bytes:
    """Return the ForwardBackwardOutput: one record for every run of data whose log-probs have the same width."""
    output = _messages()["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord", metrics=dict(passed.metrics))
    for width, run in groupby(passed.logprobs, lambda rows: rows.shape[1:]):
        rows = [np.ascontiguousarray(row, "<f4") for row in run]
        record = output.loss_fn_outputs.add(num_datums=len(rows))
        field = record.fields["logprobs"]
        field.data = b"".join(row.tobytes() for row in rows)
        field.offsets = np.cumsum([0, *(row.nbytes for row in rows)]).astype("<i8").tobytes()
        field.dtype = FLOAT32
        field.trailing_shape.extend(width)
    return bytes(output.SerializeToString())


def write_sampled(sampled: Sequence[Sampled], read: Read | None, prompt_logprobs: bool) -> bytes:
    """Return the SampleResponse: completions, and what was ``read`` of the prompt, its log-probs if asked for."""
    response = _messages()["SampleResponse"]()
    for each in sampled:
        tokens = np.ascontiguousarray(each.completion.tokens, "<i4")
        sequence = response.sequences.add(
            stop_reason=int(each.completion.truncated),
            tokens=tokens.tobytes(),
            logprobs=np.ascontiguousarray(each.completion.logprobs, "<f4").tobytes(),
        )
        if each.alternatives is not None:
            _write_alternatives(sequence.topk_sampled_logprobs, each.alternatives)
    if read is not None and prompt_logprobs:
        response.prompt_logprobs = np.ascontiguousarray(read.logprobs, "<f4").tobytes()
    if read is not None and read.alternatives is not None:
        _write_alternatives(response.topk_prompt_logprobs, read.alternatives)
    if read is not None and read.targets is not None:
        _write_tensor(response.target_prompt_logprobs, read.targets, FLOAT32)
    if read is not None and read.drawn is not None:
        _write_tensor(response.prompt_alt_tokens.tokens, read.drawn.tokens, INT64)
        _write_tensor(response.prompt_alt_tokens.logprobs, read.drawn.logprobs, FLOAT32)
    return bytes(response.SerializeToString())


def _write_tensor(target: Any, array: np.ndarray, dtype: int) -> None:
    """Fill a Tensor."""
    target.dense, target.dtype = np.ascontiguousarray(array, _DTYPES[dtype]).tobytes(), dtype
    target.shape.extend(array.shape)


def _write_alternatives(target: Any, found: Alternatives) -> None:
    """Fill a TopkLogprobs."""
    target.token_ids = np.ascontiguousarray(found.tokens, "<i4").tobytes()
    target.logprobs = np.ascontiguousarray(found.logprobs, "<f4").tobytes()
    target.length, target.k = found.tokens.shape
