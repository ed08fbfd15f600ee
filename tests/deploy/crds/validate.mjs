// Reads objects as a JSON list from standard input; prints a JSON list of the faults of each.
import { readFileSync } from "node:fs";
import * as gateway from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as monitoring from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const models = new Map(
  [gateway, keda, monitoring]
    .flatMap((module) => Object.values(module))
    .filter((model) => model.kind)
    .map((model) => [`${model.apiVersion} ${model.kind}`, model]),
);

// Validators pass over fields that they do not know: such a field is one that none of them has looked at.
function watched(value, path, unread) {
  if (value === null || typeof value !== "object") return value;
  const copy = Array.isArray(value) ? [] : {};
  for (const [key, inner] of Object.entries(value)) {
    const place = `${path}/${key}`;
    copy[key] = watched(inner, place, unread);
    if (!Array.isArray(value)) unread.add(place);
  }
  return new Proxy(copy, {
    get(target, key) {
      unread.delete(`${path}/${String(key)}`);
      return target[key];
    },
  });
}

function faults(object) {
  const model = models.get(`${object.apiVersion} ${object.kind}`);
  if (!model) return [`no model of ${object.apiVersion} ${object.kind}`];
  const unread = new Set();
  const made = new model({ metadata: object.metadata, spec: object.spec });
  made.spec = watched(object.spec, "/spec", unread);
  try {
    made.validate();
  } catch (error) {
    return [error.message];
  }
  return [...unread].map((path) => `${path} is not known`);
}

const objects = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(objects.map(faults)));
