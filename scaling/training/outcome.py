"""What a run leaves behind: its record, from what its pack knows of it."""

import dataclasses
import math

import jax

from scaling import fields, machine, objectives, records
from scaling.config import RunConfig
from scaling.training import memory
from scaling.training.evaluation import Evaluated
from scaling.training.member import Member, finite
from scaling.training.pack import Pack


def record(
    pack: Pack, member: Member, evaluated: Evaluated | None, num_eval_tokens: int, sweep_name: str
) -> records.RunRecord:
    """The record of a member that has ended; ``evaluated`` is its loss over the whole validation split, None if it
    diverged."""
    run, plan, corpus = member.run, member.plan, pack.corpus
    diverged = evaluated is None or not math.isfinite(evaluated[0])
    ended_at = member.diverged_at_step or member.step
    num_tokens = ended_at * plan.batch_tokens if diverged else plan.num_tokens
    share = num_tokens / plan.num_tokens
    loss, standard_error = (None, None) if diverged else (evaluated.loss, evaluated.standard_error)
    lengths, described, unique_tokens = run.lengths, corpus.describe(), corpus.distinct_tokens(num_tokens)
    bits_per_byte = None
    tokens_per_byte = described["tokens_per_byte"]  # None: no text, or its maker did not say
    for source in described.get("sources", ()):  # of a mixture: how each fared and how often it was read
        mine = {} if diverged else evaluated.by_source[source["source"]]
        source |= {name: finite(value) for name, value in mine.items()}
        if mine and (run.eval.final_tokens is not None or lengths.predicted != lengths.window):  # else all of its split
            source["num_eval_tokens"] = _eval_tokens(pack.corpus, run)[source["source"]]
        source["epochs"] = source["weight"] * num_tokens / source["epoch_tokens"]
    if objectives.of(run.objective).is_likelihood and None not in (loss, tokens_per_byte):
        bits_per_byte = loss / math.log(2) * tokens_per_byte
    return records.RunRecord(
        run_id=run.run_id,
        status="diverged" if diverged else "completed",
        config=fields.to_dict(run),
        sweep={"name": sweep_name, **member.cell.place},
        num_params=plan.num_params,
        num_tokens=num_tokens,
        num_steps=plan.num_steps,
        batch_tokens=plan.batch_tokens,
        unique_tokens=unique_tokens,
        epochs=num_tokens / unique_tokens,
        tokens_per_param=num_tokens / plan.num_params["non_embedding"],
        flops={rule: flops * share for rule, flops in plan.flops.items()},
        loss=loss,
        loss_standard_error=finite(standard_error),
        bits_per_byte=bits_per_byte,
        num_eval_tokens=num_eval_tokens,
        diverged_at_step=ended_at if diverged else None,
        curve=member.curve,
        data=described,
        num_predicted_tokens=num_tokens // lengths.window * lengths.predicted,
        loss_by_position=None if diverged else evaluated.by_position,
        loss_by_block=None if diverged else evaluated.by_block,
        measures={} if diverged else evaluated.measures,
        environment=_environment(pack),
        timing=_timing(member, ended_at),
    )


def _eval_tokens(corpus, run: RunConfig) -> dict[str, int]:
    """What carries loss of each source of a mixture in validation."""
    objective, num_tokens = objectives.of(run.objective), run.eval.final_tokens
    predicted_W = objective.predicted(run.objective, corpus.validation_counts(num_tokens))
    return {source: int(predicted_W[here].sum(dtype=float)) for source, _, here in corpus.validation_shares(num_tokens)}


def _timing(member: Member, ended_at: int) -> dict:
    """What the run itself took: its share of the packs it trained in. Steps before ``branch_step`` are its trunk's."""
    plan, seconds = member.plan, member.seconds
    own_tokens = max(0, ended_at - member.branch_step) * plan.batch_tokens
    own_flops = plan.flops["exact"] * own_tokens / plan.num_tokens
    step_seconds = seconds["step"] + seconds["data"]
    return {
        "seconds": sum(seconds.values()),
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "tokens_per_s": own_tokens / step_seconds if step_seconds else None,
        "flops_per_s": own_flops / step_seconds if step_seconds else None,
        "branched_from": member.branched_from,
        "branch_step": member.branch_step,
    }


def _environment(pack: Pack) -> dict:
    device = jax.devices()[0]
    return records.software() | {
        "backend": jax.default_backend(),
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "mesh": dict(pack.mesh.shape),
        "execution": dataclasses.asdict(pack.execution),
        "pack": [m.run.run_id for m in pack.members if m is not None],
        **memory.peak(),
        "cpus": len(machine.cores()),
    }
