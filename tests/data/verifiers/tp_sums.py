"""A single-turn taskset for verifiers: sums."""

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)


class SumTaskset(vf.Taskset[SumTask]):
    def load(self):
        for a in range(4):
            yield SumTask(SumData(prompt=f"What is {a} + {a}?", answer=str(2 * a)))


__all__ = ["SumTaskset"]
