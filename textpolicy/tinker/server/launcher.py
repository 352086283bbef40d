"""The program that serves SkyRL's Tinker API with its JAX engine; it runs in the server's own environment.

It changes three things in SkyRL 0.4.0. The engine runs in this interpreter instead of one that SkyRL starts
through uv. PyTorch and peft, which SkyRL imports for images and for one small file, may be absent, which
saves gigabytes. And three calls that the SDK makes since 0.26 are answered; no computation is changed.
"""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import runpy
import signal
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def main() -> None:
    """Serve until the standard input closes, which happens when the process that started this ends."""
    for name, contents in (("torch", {"Tensor": type("Tensor", (), {})}), ("peft", {"LoraConfig": LoraConfig})):
        if importlib.util.find_spec(name) is None:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(contents)
            sys.modules[name] = module
    if sys.argv[1:2] == ["--engine"]:  # started by the API below
        del sys.argv[1]
        runpy.run_module("skyrl.tinker.engine", run_name="__main__", alter_sys=True)
        return

    def end_with_parent() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    serve()


@dataclasses.dataclass
class LoraConfig:
    """The five settings of peft's class that SkyRL writes beside an adapter."""

    base_model_name_or_path: str | None = None
    r: int = 8
    lora_alpha: float = 8
    peft_type: str = "LORA"
    task_type: str | None = None

    def save_pretrained(self, path: str, **_: Any) -> None:
        (Path(path) / "adapter_config.json").write_text(json.dumps(dataclasses.asdict(self)))


def serve() -> None:
    """Run the API with the command line's settings."""
    import uvicorn
    from skyrl.tinker import api
    from skyrl.tinker.config import EngineConfig, add_model, config_to_argv
    from skyrl.utils.log import get_uvicorn_log_config

    parser = argparse.ArgumentParser()
    add_model(parser, EngineConfig)
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    args = vars(parser.parse_args())
    api.app.state.engine_config = EngineConfig.model_validate(
        {name: value for name, value in args.items() if name in EngineConfig.model_fields}
    )
    engine = [sys.executable, "-P", __file__, "--engine"]
    api._build_uv_run_cmd_engine = lambda _, config: [*engine, *config_to_argv(config)]
    answer_newer_calls(api)
    log = get_uvicorn_log_config()
    uvicorn.run(api.app, host=args["host"], port=args["port"], log_config=log, timeout_keep_alive=75)


def answer_newer_calls(api: Any) -> None:
    """Make sampling name its sequences, sessions end on request, and models start from a checkpoint."""
    from fastapi import Depends, HTTPException, Request
    from skyrl.tinker import types
    from skyrl.tinker.db_models import FutureDB, ModelDB

    in_session = Depends(api.get_session)
    mine = {"/api/v1/asample", "/api/v1/load_weights"}
    api.app.router.routes[:] = [route for route in api.app.router.routes if getattr(route, "path", "") not in mine]

    async def asample(request, http, session=in_session):  # type: ignore[no-untyped-def]
        future = await api.asample(request, http, session)
        names = [f"seq_{future.request_id}_{i}" for i in range(request.num_samples)]
        return {**future.model_dump(), "sample_sequence_ids": names}

    async def finish(session_id, session=in_session):  # type: ignore[no-untyped-def]
        """Free the adapter slots of the session at once instead of after minutes of silence."""
        found = await session.exec(api.select(ModelDB).where(ModelDB.session_id == session_id))
        for model in found.all():
            if model.status not in ("unloading", "unloaded"):
                model.status = "unloading"
                unload = types.UnloadModelInput()
                await api.create_future(session, types.RequestType.UNLOAD_MODEL, model.model_id, unload)
        await session.commit()

    def pending(number: int) -> dict[str, str]:
        return {"future_id": str(number), "status": "pending", "request_id": str(number)}

    async def load_weights(request, http, session=in_session):  # type: ignore[no-untyped-def]
        if request.get("session_id") is None:
            return await api.load_weights(api.LoadWeightsRequest.model_validate(request), http, session)
        path = types.TinkerPath.parse(request["path"])
        if not path or path.kind != "weights":
            raise HTTPException(400, f"{request['path']} is not the path of a state: tinker://RUN/weights/NAME")
        await api.validate_checkpoint(http, path.primary_id, path.secondary_id, types.CheckpointType.TRAINING, session)
        source = await api.get_model(session, path.primary_id)
        lora = types.LoraConfig.model_validate(source.lora_config)
        model = f"{request['session_id']}:train:{request['model_seq_id']}"
        earlier = api.select(FutureDB).where(
            FutureDB.model_id == model, FutureDB.request_type == types.RequestType.LOAD_WEIGHTS
        )
        if (known := (await session.exec(earlier)).first()) is not None:  # its answer was lost on the way
            return pending(known.request_id)
        create = types.CreateModelInput(lora_config=lora)
        created = await api.create_future(session, types.RequestType.CREATE_MODEL, model, create)
        session.add(
            ModelDB(
                model_id=model,
                base_model=request.get("base_model") or source.base_model,
                lora_config=lora.model_dump(),
                status="created",
                request_id=created,
                session_id=request["session_id"],
            )
        )
        load = types.LoadWeightsInput(
            source_model_id=path.primary_id,
            checkpoint_id=path.secondary_id,
            load_optimizer=request.get("optimizer", True),
        )
        loaded = await api.create_future(session, types.RequestType.LOAD_WEIGHTS, model, load)
        await session.commit()
        return pending(loaded)

    # FastAPI reads types at run time, and these names exist only in this function
    asample.__annotations__ = {"request": api.SampleRequest, "http": Request}
    load_weights.__annotations__ = {"request": dict, "http": Request}
    finish.__annotations__ = {"session_id": str}
    api.app.post("/api/v1/asample")(asample)
    api.app.post("/api/v1/load_weights")(load_weights)
    api.app.post("/api/v1/sessions/{session_id}/finish", status_code=204)(finish)


if __name__ == "__main__":
    main()
