//! The results of the rounds: tables, ratios, and targets.

use crate::support::measure::Summary;
use crate::support::report::{at_least, at_most};
use crate::{Case, Contender, H2, Load, Round, TONIC, Tuplewatch, Written};
use std::collections::BTreeMap;

/// All rounds, by case and contender.
#[derive(Default)]
pub(crate) struct Results(BTreeMap<(&'static str, Contender), Vec<Round>>);

/// One figure of a round.
type Figure = fn(&Round) -> f64;
const CPU: Figure = |round| round.cpu_us_per_message;
const P99: Figure = |round| round.p99_ms;
const DELIVERED: Figure = |round| round.delivered_per_second;

impl Results {
    pub(crate) fn add(&mut self, case: &Case, contender: Contender, round: Round) {
        self.0.entry((case.name, contender)).or_default().push(round);
    }

    /// The load of tuplewatch's last round.
    pub(crate) fn last_written(&self, case: &Case) -> Written {
        self.rounds(case.name, Tuplewatch).last().expect("tuplewatch is the first").written
    }

    fn rounds(&self, case: &'static str, contender: Contender) -> &[Round] {
        self.0.get(&(case, contender)).map_or(&[], Vec::as_slice)
    }

    fn summary(&self, case: &'static str, contender: Contender, of: Figure) -> Option<Summary> {
        let figures: Vec<f64> = self.rounds(case, contender).iter().map(of).collect();
        (!figures.is_empty()).then(|| Summary::of(&figures))
    }

    /// The ratio of tuplewatch's figure to that of a baseline in the same round.
    fn ratio(&self, case: &'static str, baseline: Contender, of: Figure) -> Option<Summary> {
        let pairs = self.rounds(case, Tuplewatch).iter().zip(self.rounds(case, baseline));
        let ratios: Vec<f64> = pairs.map(|(ours, theirs)| of(ours) / of(theirs)).collect();
        (!ratios.is_empty()).then(|| Summary::of(&ratios))
    }

    pub(crate) fn tell(&self, cases: &[&Case]) {
        self.tell_delivery(cases);
        self.tell_cost(cases);
        self.tell_ratios(cases);
        println!();
        self.tell_targets();
    }

    fn tell_delivery(&self, cases: &[&Case]) {
        println!(
            "\n{:<14}{:<12}{:>12}  {:<12}{:>32}{:>24}{:>24}",
            "case", "server", "subscribers", "load", "delivered/s", "p50 ms", "p99 ms"
        );
        self.each(cases, |case, contender, summary| {
            let (load, paced) = match case.load {
                Load::Paced(rate) => (format!("{rate}/s"), true),
                Load::Unpaced => ("4 writers".to_owned(), false),
                Load::Backlog => ("a backlog".to_owned(), false),
            };
            // With an unpaced load, latency is only the length of the queue.
            let latency = |of: Figure| if paced { format!("{:.2}", summary(of)) } else { "-".to_owned() };
            println!(
                "{:<14}{:<12}{:>12}  {load:<12}{:>32}{:>24}{:>24}",
                case.name,
                contender.name(),
                case.streams(),
                format!("{:.0}", summary(DELIVERED)),
                latency(|round| round.p50_ms),
                latency(P99),
            );
        });
    }

    fn tell_cost(&self, cases: &[&Case]) {
        println!(
            "\n{:<14}{:<12}{:>24}{:>24}{:>24}{:>24}",
            "case", "server", "CPU µs/message", "CPU % of a core", "resident MiB", "KiB/idle subscriber"
        );
        self.each(cases, |case, contender, summary| {
            let idle = summary(|round| round.idle_kib_per_subscriber);
            println!(
                "{:<14}{:<12}{:>24}{:>24}{:>24}{:>24}",
                case.name,
                contender.name(),
                format!("{:.2}", summary(CPU)),
                format!("{:.1}", summary(|round| round.cpu_percent)),
                format!("{:.1}", summary(|round| round.resident_mib)),
                if case.streams() < 100 { "-".to_owned() } else { format!("{idle:.1}") },
            );
        });
    }

    fn each(&self, cases: &[&Case], tell: impl Fn(&Case, Contender, &dyn Fn(Figure) -> Summary)) {
        for case in cases {
            for contender in case.contenders() {
                tell(case, *contender, &|of| self.summary(case.name, *contender, of).expect("a round of each"));
            }
        }
    }

    fn tell_ratios(&self, cases: &[&Case]) {
        println!(
            "\n{:<14}{:>28}{:>28}{:>28}{:>28}",
            "tuplewatch to", "tonic's way: CPU/message", "delivered/s", "p99", "bare h2: CPU/message"
        );
        for case in cases.iter().filter(|case| !case.quiet) {
            let ratio = |baseline, of| {
                let ratio = self.ratio(case.name, baseline, of).expect("a round of each");
                format!("{ratio:.2}")
            };
            let p99 = if matches!(case.load, Load::Paced(_)) { ratio(TONIC, P99) } else { "-".to_owned() };
            println!(
                "{:<14}{:>28}{:>28}{p99:>28}{:>28}",
                case.name,
                ratio(TONIC, CPU),
                ratio(TONIC, DELIVERED),
                ratio(H2, CPU)
            );
        }
    }

    /// Times differ between machines, so they are compared with baselines that ran on the same machine a moment before
    /// or after. Bytes are comparable.
    fn tell_targets(&self) {
        for (what, case) in [("1,000 × 200", "1000"), ("5,000 × 50", "5000"), ("saturated", "saturated")] {
            let tell = |figure: &str, baseline: Contender, of, limit| {
                if let Some(ratio) = self.ratio(case, baseline, of) {
                    let what = format!("{what}, {figure}, to {}", baseline.name());
                    println!("{}", at_most(&what, ratio.median, limit, " ×"));
                }
            };
            tell("CPU a message", TONIC, CPU, 0.3);
            tell("CPU a message", H2, CPU, 2.0);
            if case != "saturated" {
                tell("p99", TONIC, P99, 1.0);
            }
        }
        for case in ["saturated", "backlog"] {
            if let Some(ratio) = self.ratio(case, TONIC, DELIVERED) {
                println!("{}", at_least(&format!("{case}, delivered, to {}", TONIC.name()), ratio.median, 1.5, " ×"));
            }
        }
        if let Some(idle) = self.summary("5000", Tuplewatch, |round| round.idle_kib_per_subscriber) {
            println!("{}", at_most("resident per idle subscriber", idle.median, 4.0, " KiB"));
        }
        // One message, because PostgreSQL may commit fewer than are due in one of the two rounds.
        let cpu = |case| Some(self.summary(case, Tuplewatch, CPU)?.median);
        if let (Some(without), Some(with)) = (cpu("0-quiet"), cpu("1000-quiet")) {
            // Rounds differ by about a tenth.
            println!("{}", at_most("CPU with 1,000 quiet subscribers, to that without", with / without, 1.1, " ×"));
        }
    }
}
