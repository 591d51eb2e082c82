//! `tuplewatch setup` and `tuplewatch teardown`: create the tables, the publication and the slot, and remove
//! publication and slot.

use super::overrides::ConfigArgs;
use super::say;
use crate::admin::setup::{Event, Script, Setup, Teardown};
use crate::app;
use crate::cli::telemetry;
use crate::config::{Config, Failover, MappingSource, Preset};

#[derive(Debug, clap::Args)]
pub(super) struct SetupArgs {
    /// Print the statements without running them
    #[arg(long)]
    dry_run: bool,
    /// Drop the replication slot and create a new one, for example after it was lost. Subscribers receive a gap
    #[arg(long)]
    recreate_slot: bool,
}

/// Prints each step as it begins, and each wait.
fn report(event: Event<'_>) {
    match event {
        Event::Step(step) => say(&format!("{} ...", step.explanation)),
        Event::Waiting(waiting) => tracing::warn!("{waiting}"),
        Event::Locked => tracing::warn!("waiting for another setup or teardown that runs in this database"),
    }
}

pub(super) async fn setup(config: &ConfigArgs, args: &SetupArgs) -> anyhow::Result<()> {
    let config = config.load()?;
    config.require_database_uri()?;
    telemetry::init(&config.logger);
    if !args.dry_run {
        let done = apply(&config, args.recreate_slot).await?;
        say(if done == 0 { "nothing to do: everything exists" } else { "done" });
        return Ok(());
    }
    let mapping = app::load_mapping(&config)?;
    let connection = app::endpoints(&config)?.connect("tuplewatch setup").await?;
    let steps = desired_state(&config, &mapping, args.recreate_slot).plan(&connection.client).await?;
    if steps.is_empty() {
        say("-- nothing to do: everything exists");
    } else {
        say(&Script(&steps).to_string());
    }
    Ok(())
}

fn desired_state<'a>(
    config: &'a Config,
    mapping: &'a crate::decode::mapping::Mapping,
    recreate_slot: bool,
) -> Setup<'a> {
    Setup {
        mapping,
        slot: &config.replication.slot,
        publication: &config.replication.publication,
        apply_schema: config.mapping.source == MappingSource::Preset(Preset::Tuples),
        recreate_slot,
        failover: config.replication.failover == Failover::Auto,
        commands: config.commands(),
    }
}

/// Runs the missing steps, and returns their number.
pub(super) async fn apply(config: &Config, recreate_slot: bool) -> anyhow::Result<usize> {
    let mapping = app::load_mapping(config)?;
    let connection = app::endpoints(config)?.connect("tuplewatch setup").await?;
    let steps = desired_state(config, &mapping, recreate_slot).apply(&connection, &mut report).await?;
    Ok(steps.len())
}

pub(super) async fn teardown(config: &ConfigArgs) -> anyhow::Result<()> {
    let config = config.load()?;
    config.require_database_uri()?;
    telemetry::init(&config.logger);
    let connection = app::endpoints(&config)?.connect("tuplewatch teardown").await?;
    let teardown = Teardown { slot: &config.replication.slot, publication: &config.replication.publication };
    let steps = teardown.apply(&connection, &mut report).await?;
    say(if steps.is_empty() { "nothing to do: neither slot nor publication exists" } else { "done" });
    Ok(())
}
