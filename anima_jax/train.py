"""python -m anima_jax.train --config FILE.toml"""

if __name__ == "__main__":
    from anima_jax.launch import train

    train()  # which imports this module under its own name

import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence

import jax

from anima_jax.checkpoints.hub import headers_only
from anima_jax.checkpoints.locations import replacing, writing_to
from anima_jax.checkpoints.models import open_text_encoder
from anima_jax.checkpoints.orbax import errors_reported_once
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.config.summary import summary
from anima_jax.data.dataset import read_data
from anima_jax.data.dump import dump_dataset
from anima_jax.data.encoders import Encoders
from anima_jax.data.examples import contents_of
from anima_jax.data.loader import prefetched
from anima_jax.data.problems import Problems
from anima_jax.errors import UserError, command_line
from anima_jax.exit_codes import STOPPED
from anima_jax.parallel import hosts
from anima_jax.parallel.devices import use_device_memory
from anima_jax.parallel.mesh import check_mesh, make_mesh, replicas, resolve_sizes
from anima_jax.parallel.rules import AXES
from anima_jax.parallel.topologies import parse_topology, use_compilers
from anima_jax.sampling.matching import check_networks
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.training import command, estimate, events, fit, optimizers, tables
from anima_jax.training.batches import Batches, OnlineText
from anima_jax.training.dry_run import dry_run
from anima_jax.training.export import find_export, sweep
from anima_jax.training.intervals import Every, RunPoint
from anima_jax.training.profiling import Profiler, parse_steps, use_compilation_cache, watch_compilation
from anima_jax.training.resume import Checkpointer, frozen_fingerprint, run_metadata, training_settings
from anima_jax.training.run import Run
from anima_jax.training.run_folder import ChosenRun, alone_in, choose_run, configuration_files, make_folder, replicas_of
from anima_jax.training.samples import check_pictures, make_samples
from anima_jax.training.signals import Request, Signals
from anima_jax.training.state import build_optimizer, dit_config, learning_rates, prepare
from anima_jax.training.step import StepConfig, compile_step, init_state
from anima_jax.training.target import target_of
from anima_jax.training.writer import check_monitoring, open_writer


@command_line
def main(argv: Sequence[str] | None = None) -> None:  # noqa: C901, PLR0912, PLR0915 - see its docstring
    """Train a model as the configuration says.

    This is the whole program, from top to bottom: configuration, mesh, data, model, optimizer, restore, loop.
    One function: each part is a few calls that use the results of the parts before it.
    """
    command.log_to_console()
    arguments = command.parse_arguments(argv)
    topology = parse_topology(arguments.compile) if arguments.compile is not None else None
    if topology:
        use_compilers()
    use_device_memory()
    hosts.join(arguments.coordinator_address, arguments.num_processes, arguments.process_id)
    with hosts.abort_all_on_error(), errors_reported_once(), contextlib.ExitStack() as stack:
        # ---- configuration ----------------------------------------------------------------------------------------

        def load(keys: Sequence[str] = ()) -> MainConfig:
            return load_config(
                arguments.config,
                [*command.overrides(arguments), *keys],
                i_know_what_i_am_doing=arguments.i_know_what_i_am_doing,
                check_optimizer=optimizers.check,
            )

        if topology:
            topology.devices()  # before anything else: its compiler may be missing
        if arguments.dry_run:  # says whether a run fits before gigabytes are downloaded
            stack.enter_context(headers_only())
        config = load()
        toml_files = configuration_files(config)  # now: they may be renamed during the run
        hosts.assert_same_on_all_processes(lambda: command.shared_arguments(config, arguments))
        target = target_of(arguments, topology)

        # ---- mesh -------------------------------------------------------------------------------------------------

        if target.devices:  # a dry run does not need the devices that it is for
            mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
            sizes = resolve_sizes(config.mesh.sizes, target.devices)
        else:
            mesh = make_mesh(config.mesh.sizes)
            sizes = mesh.shape
        network = dit_config(config)
        check_mesh(sizes, network.width, network.heads)
        stack.enter_context(jax.set_mesh(mesh))

        # ---- checks and messages, before hours of encoding --------------------------------------------------------

        profiled_steps = parse_steps(arguments.profile) if arguments.profile else None
        check_monitoring(config)
        check_pictures(config)
        use_compilation_cache(config.compilation_cache_dir)
        for line in (*command.unsupported_flags(arguments), *config.messages, *summary(config)):
            print(line)
        tokenizers = load_tokenizers(config.model.tokenizers)
        with open_text_encoder(config.model.llm_files, allow_unused=config.allow_unused) as text_encoder:
            check_networks(network, text_encoder.config, tokenizers)
        abstract = estimate.abstract_partition(config)
        build_optimizer(config, abstract)
        run, resources = Run(config, replicas(sizes)), stack.enter_context(contextlib.ExitStack())
        chosen = ChosenRun()
        if not arguments.cache_only:
            chosen = choose_run(config, resources, lock_folder=not (arguments.dry_run or arguments.dump_dataset))
        if chosen.folder and chosen.resumed:
            run = dataclasses.replace(run, restored_replicas=replicas_of(chosen.folder))

        # ---- data -------------------------------------------------------------------------------------------------

        problems = Problems(strict=config.strict_data)
        keep = hosts.is_process_0() and not arguments.dry_run
        with hosts.process_0_first():
            data = read_data(config, problems, batch_size_of=run.global_batch, keep=keep)
        hosts.assert_same_on_all_processes(data.described_fingerprint)
        fitted: fit.Keys | None = None
        if not arguments.cache_only:
            devices, rows = math.prod(sizes.values()), data.text_rows(tokenizers)
            variants = fit.RunVariants(run, abstract, data, rows, load, devices=devices, platform=target.platform)
            if config.memory == "fit":
                stored = fit.stored_keys(chosen.folder) if chosen.folder and chosen.resumed else None
                fitted, variant = fit.choose(variants, target, stored, required=not arguments.dry_run)
                config, abstract = variant.config, variant.partition
                run = dataclasses.replace(run, config=config)
                data.use_config(config)
                if not target.devices:
                    mesh = make_mesh(config.mesh.sizes)
                    stack.enter_context(jax.set_mesh(mesh))
            elif target.memory is not None and not (arguments.dry_run or arguments.dump_dataset):
                variants.check_size(target.memory, target.name)
        if arguments.dry_run:
            if problems.count:
                print(problems.summary())
            before = fit.overrides_of(fitted or {})
            dry_run(run, abstract, data, tokenizers, target, lambda keys: load([*before, *keys]), topology)
            return
        stack.enter_context(command.output_may_fail())
        for path in filter(None, [config.output_dir, arguments.dump_dataset]):
            with writing_to(path):
                pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        with hosts.process_0_first():
            eval_data = {
                each.name: read_data(config, problems, batch_size_of=run.eval_batch, eval_dataset=each, keep=keep)
                for each in config.eval_datasets
            }
        for each in eval_data.values():
            hosts.assert_same_on_all_processes(each.described_fingerprint)
        encoders = Encoders(config, tokenizers)
        hosts.assert_same_on_all_processes(lambda: encoders.fingerprints)
        for each in (data, *eval_data.values()):
            each.open_cache(encoders)
        for each in (data, *eval_data.values()):
            each.encode(encoders, problems)
            hosts.assert_same_on_all_processes(each.described_fingerprint)
        if arguments.dump_dataset and hosts.is_process_0():
            path = dump_dataset(arguments.dump_dataset, data.examples, data.cache, encoders.vae, config)
            print(f"wrote the data set, as the VAE decodes it, to {path}")
        hosts.barrier("the data are encoded")
        if arguments.cache_only or arguments.dump_dataset:
            return
        run_folder = chosen.folder
        if run_folder is None or not chosen.locked:
            run_folder = hosts.from_process_0(lambda: make_folder(pathlib.Path(config.output_dir), chosen.folder))
            resources.enter_context(alone_in(run_folder))
        if config.resume and not chosen.resumed:
            print(f"there is no checkpoint to resume from: the run begins, in {run_folder}")
        if hosts.is_process_0():
            sweep(run_folder)
            for name, content in toml_files.items():
                with replacing(run_folder / name) as file:
                    file.write(content)
            if fitted is not None:
                fit.store_keys(run_folder, fitted)
        encoders = encoders.on(mesh)
        batches = Batches(run, data, tokenizers)
        eval_batches = {name: Batches(run, each, tokenizers) for name, each in eval_data.items()}

        # ---- model and optimizer ----------------------------------------------------------------------------------

        # A trained text encoder runs inside the step.
        encodes_online = not (config.model.cache_text_embeddings or config.trains_text_encoder)
        online_text = OnlineText(encoders.text_encoder, config) if encodes_online else None
        encode_text = online_text or (lambda text: text)
        partition = prepare(config, lambda: encoders.text_encoder)
        print(tables.start_up_table(config, partition, data.describe(tokenizers)))
        step_config = StepConfig.of(config)
        optimizer = build_optimizer(config, partition, data.plan)
        workloads = estimate.step_workloads(run, data, *data.text_rows(tokenizers))
        flops = [estimate.example_flops(partition, step_config, each).model * each.batch for each in workloads]
        state = init_state(partition.params, optimizer, step_config)
        partition = dataclasses.replace(partition, params={})  # train_step donates them
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        train_step = compile_step(partition.graphdef, optimizer, step_config, partition.groups, shardings)

        # ---- restore ----------------------------------------------------------------------------------------------

        metadata = run_metadata(
            state.params,
            partition.groups,
            data.plan,
            data.ids,
            training_settings(config.model_dump(mode="json")),
            contents=contents_of(data.examples),
            files=encoders.fingerprints | frozen_fingerprint(partition.frozen),
            replicas=run.batch_replicas,
        )
        checkpointer = Checkpointer(
            run_folder,
            data.plan,
            metadata,
            keep=config.max_checkpoints,
            every_n_minutes=config.checkpoint_every_n_minutes,
        )
        if chosen.resumed:
            state, messages = checkpointer.restore(
                state,
                lambda params: init_state(params, optimizer, step_config).opt_state,
                reset_dataloader=config.reset_dataloader,
                reset_optimizer=config.reset_optimizer,
                reset_optimizer_params=config.reset_optimizer_params,
            )
            print(f"resumed {run_folder} after step {checkpointer.start.step}")
            for message in messages:
                print(f"  {message}")

        # ---- events -----------------------------------------------------------------------------------------------

        start = checkpointer.start
        total = checkpointer.total_steps(config.epochs, config.max_steps)
        point = checkpointer.point_after(start.step, total)
        rates = learning_rates(config, data.plan)
        signals = resources.enter_context(contextlib.closing(Signals(run_folder, hosts.Consensus(mesh))))
        resources.enter_context(contextlib.closing(checkpointer))
        profiler = resources.enter_context(contextlib.closing(Profiler(profiled_steps, run_folder / "profile")))
        writer = open_writer(
            config,
            run_folder,
            point,
            epoch_start=checkpointer.epoch_start,
            evaluates=bool(eval_batches),
            resumed=chosen.resumed,
            rates=lambda step: rates.after(start.position_after(step).optimizer_step),
            peak_flops=estimate.peak_flops(jax.devices(), config.compute_dtype),
        )
        resources.enter_context(contextlib.closing(writer))
        interruptible: list[events.Interruptible] = [
            events.Evaluate(run, eval_batches, partition, step_config, encode_text, writer),
            *make_samples(config, partition, state, encoders, run_folder, writer),
        ]
        encoders.release()  # frees device memory: what encodes text online or draws samples keeps its own references
        self_check = events.SelfCheck(run, partition, writer)
        skipped_updates = events.SkippedUpdates(
            run,
            run_folder,
            checkpointer,
            writer,
            examples=lambda step: batches.names(start.position_after(step - 1).data_step),
        )
        export = events.Export(run, partition, run_folder, writer, toml_files, data)
        checkpoint_every = Every(epochs=config.checkpoint_every_n_epochs)

        def run_interruptible(point: RunPoint, due: Sequence[events.Interruptible]) -> None:
            def run_all() -> None:
                for event in due:
                    event.perform(point, state)

            signals.cut_short(run_all)

        def save_checkpoint(point: RunPoint, *, wait: bool = False) -> bool:
            writer.sync()  # a resumed run does not repeat the steps before
            return checkpointer.save(point.step, state, wait=wait, announce=writer.print)

        def stop_for(request: Request | None, point: RunPoint) -> bool:
            """Save if requested, and return whether to stop. If the checkpoint cannot be saved, the run continues."""
            saved = request is not None and save_checkpoint(point, wait=request == "save_quit")
            if request != "save_quit" or not saved:
                return False
            resume = command.resume_command(arguments, run_folder)
            writer.print(f"stopped after step {point.step}, as requested; resume with: {resume}")
            return True

        # ---- loop -------------------------------------------------------------------------------------------------

        # A resumed run first does what was due when the earlier attempt stopped.
        repeats = point.step > 0 and config.reset_dataloader
        run_interruptible(
            point, [event for event in interruptible if event.due(point) and not event.done(point) and not repeats]
        )
        stopped = stop_for(signals.agreed(), point)
        if point.step == total and not stopped:
            writer.print(
                f"the run is finished: {point.step} of {total} steps; to train longer, raise epochs or max_steps"
            )
            export.perform(point, state, export.missing(point))
        unconditional = encode_text(batches.unconditional()) if config.uncond_fraction and not stopped else None
        compiled: set[tuple[int, int, bool]] = set()
        loading = prefetched(
            batches.load, start.data_step, start.position_after(total).data_step, threads=config.map_num_proc
        )
        loaded = resources.enter_context(contextlib.closing(loading))
        while not stopped and point.step < total:
            point = checkpointer.point_after(point.step + 1, total)
            waiting = time.monotonic()
            host_batch, accumulation, tier_number = next(loaded)
            waited = time.monotonic() - waiting
            tier = data.plan.tiers[tier_number]
            # The device is still computing the previous step: it does not wait for the host, and the host not for it.
            batch = batches.put(host_batch, tier_number)
            batch = batch._replace(text=encode_text(batch.text))
            with contextlib.nullcontext() if tier.program in compiled else watch_compilation() as compilation:
                state, metrics = profiler.run_step(
                    point.step, train_step, state, partition.frozen, batch, unconditional, accumulation
                )
            if compilation:
                compiled.add(tier.program)
                writer.print(f"the step of tier {tier.name} was compiled in {compilation}")
            # This writes the metrics of the previous step.
            writer.step(point, metrics.scalars, flops=flops[tier_number], waited=waited)
            if self_check.due:
                self_check.perform(point, metrics.norms)
            skipped_updates.check()
            if export.due(point):
                export.perform(point, state)
            if point.step == total or (checkpoint_every.due(point) and writer.updated()):
                save_checkpoint(point)
            overdue = hosts.is_process_0() and checkpointer.overdue() and writer.updated()
            if overdue:
                checkpointer.postpone()
            stopped = stop_for(signals.agreed(save=overdue), point)
            due = [event for event in interruptible if event.due(point)]
            if due and not stopped:
                run_interruptible(point, due)
                stopped = stop_for(signals.agreed(), point)
        if not stopped:
            writer.flush()
            skipped_updates.check()
            if export.error:
                raise UserError(export.error)
        resources.close()

        if online_text:
            print(f"encoding text took {online_text.share(writer.seconds_a_step):.0%} of a step")
        with contextlib.suppress(UserError):  # a run that stopped early may have saved no model
            find_export(run_folder)
            print(f"sample with: {command.sample_command(config, data, arguments, run_folder)}")
    if stopped:
        sys.exit(STOPPED)
