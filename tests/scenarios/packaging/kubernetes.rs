//! `docker/kubernetes/tuplewatch.yaml`.

use super::image::Image;
use super::{Database, Environment, Recipe, assignments, environment, leaves_time_to_stop, read, text, texts, yaml};
use crate::support::change::Change;
use crate::support::wait::eventually;
use serde_json::Value as Json;

struct Manifests {
    objects: Vec<Json>,
    image: Image,
}

impl Manifests {
    fn read() -> Self {
        let text = read("docker/kubernetes/tuplewatch.yaml");
        Self { objects: text.split("\n---\n").map(yaml).collect(), image: Image::read() }
    }

    fn object(&self, kind: &str, name: &str) -> &Json {
        let found = self.objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
        found.unwrap_or_else(|| panic!("no {kind} {name}"))
    }

    fn of_secret(&self, reference: &Json) -> String {
        let secret = self.object("Secret", &text(&reference["name"]));
        text(&secret["stringData"][text(&reference["key"])])
    }

    /// The command of the only container of a pod. `index` is the number of a StatefulSet's pod.
    fn recipe(&self, object: &Json, index: usize) -> Recipe {
        let spec = &object["spec"]["template"]["spec"];
        // Otherwise services named tuplewatch would add variables that look like ours.
        assert_eq!(spec["enableServiceLinks"], false);
        let [container] = &spec["containers"].as_array().unwrap()[..] else { panic!("one container") };
        assert_eq!(container["image"], concat!("tuplewatch:", env!("CARGO_PKG_VERSION")));
        assert!(container.get("command").is_none(), "the image has its entrypoint");

        let mut all = self.image.environment();
        for source in container.get("envFrom").and_then(Json::as_array).into_iter().flatten() {
            let map = self.object("ConfigMap", &text(&source["configMapRef"]["name"]));
            all.extend(environment(&map["data"]));
        }
        let mut fields = Environment::new();
        for variable in container["env"].as_array().unwrap() {
            let name = text(&variable["name"]);
            let from = &variable["valueFrom"];
            if from.get("fieldRef").is_some() {
                assert_eq!(from["fieldRef"]["fieldPath"], "metadata.labels['apps.kubernetes.io/pod-index']");
                fields.insert(name, index.to_string());
            } else if from.get("secretKeyRef").is_some() {
                all.insert(name, self.of_secret(&from["secretKeyRef"]));
            } else {
                let value = text(&variable["value"]);
                let value = fields.iter().fold(value, |value, (field, is)| value.replace(&format!("$({field})"), is));
                all.insert(name, value);
            }
        }
        Recipe { arguments: texts(&container["args"]), environment: all }
    }
}

#[tokio::test]
async fn a_token_of_one_pod_resumes_on_the_other() {
    let manifests = Manifests::read();
    let job = manifests.object("Job", "tuplewatch-setup");
    let set = manifests.object("StatefulSet", "tuplewatch");
    let mut passwords = assignments(&read("docker/.env.example"));
    for (variable, secret) in [("TUPLEWATCH_PASSWORD", "tuplewatch"), ("TUPLEWATCH_OWNER_PASSWORD", "tuplewatch-owner")]
    {
        let password = text(&manifests.object("Secret", secret)["stringData"]["password"]);
        passwords.insert(variable.to_owned(), password);
    }
    let database = Database::start(&[], &passwords).await;
    manifests.recipe(job, 0).sets_up(&database).await;
    assert_eq!(set["spec"]["replicas"], 2);
    let first = manifests.recipe(set, 0).serves(&database).await;
    let second = manifests.recipe(set, 1).serves(&database).await;
    let slots = "SELECT string_agg(slot_name, ' ' ORDER BY slot_name) FROM pg_replication_slots WHERE active";
    let sql = database.sql().await;
    eventually("both slots are read", async || sql.value(slots).await == "tuplewatch_0 tuplewatch_1").await;

    let spec = &set["spec"]["template"]["spec"];
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let probe = &spec["containers"][0][probe]["httpGet"];
        assert_eq!(probe["port"], "http");
        first.answers(&text(&probe["path"])).await;
    }
    let annotations = &set["spec"]["template"]["metadata"]["annotations"];
    first.answers(&text(&annotations["prometheus.io/path"])).await;

    let token = first.delivers(&database, "d1").await;
    leaves_time_to_stop(&format!("{}s", spec["terminationGracePeriodSeconds"]));
    first.stops("TERM").await;
    let mut stream = second.watch(&token).await;
    sql.insert("t1", "d2").await;
    stream.expect(Change::created("d2")).await;
    second.stops("TERM").await;
}

#[test]
fn names_in_the_manifests_match_the_image() {
    let manifests = Manifests::read();
    let set = manifests.object("StatefulSet", "tuplewatch");
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let port = |port: &Json| u16::try_from(port["containerPort"].as_u64().unwrap()).unwrap();
    let ports = container["ports"].as_array().unwrap().iter().map(port).collect();
    assert_eq!(manifests.image.ports(), ports);
    assert_eq!(container["volumeMounts"][0]["mountPath"], manifests.image.volume());
    assert_eq!(container["volumeMounts"][0]["name"], set["spec"]["volumeClaimTemplates"][0]["metadata"]["name"]);
    manifests.object("Service", set["spec"]["serviceName"].as_str().unwrap());
    // Kubernetes mounts the volume for this group, so that the user of the image may write to it.
    assert_eq!(set["spec"]["template"]["spec"]["securityContext"]["fsGroup"], 65532);
    let selector = &set["spec"]["selector"]["matchLabels"];
    for object in manifests.objects.iter().filter(|object| object["kind"] == "Service") {
        assert_eq!(object["spec"]["selector"], *selector, "{}", object["metadata"]["name"]);
    }
    assert_eq!(set["spec"]["template"]["metadata"]["labels"], *selector);
}
