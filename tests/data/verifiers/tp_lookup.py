"""A taskset for verifiers with a tool that has to be called: the secret of a name."""

import verifiers.v1 as vf

SECRETS = {"ann": "7141", "bob": "2820"}


class Lookup(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    async def secret_of(self, name: str) -> str:
        """The secret of a name."""
        return SECRETS.get(name, "nobody")


class LookupData(vf.TaskData):
    who: str


class LookupTask(vf.Task[LookupData]):
    @classmethod
    def toolsets(cls, config):
        return [Lookup(vf.ToolsetConfig())]

    @vf.reward
    async def told(self, trace: vf.Trace) -> float:
        return float(SECRETS[self.data.who] in trace.last_reply)


class LookupTaskset(vf.Taskset[LookupTask]):
    def load(self):
        for who in SECRETS:
            yield LookupTask(LookupData(prompt=f"What is the secret of {who}?", who=who))


__all__ = ["LookupTaskset"]

if __name__ == "__main__":
    Lookup.run()
