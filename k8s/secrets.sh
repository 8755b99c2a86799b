#!/bin/sh
# Prints what the manifests refer to: passwords, the cluster's secret, and certificates for both Redis servers under an
# authority of their own, which lives as long as they do. Once:
#
#   k8s/secrets.sh | kubectl apply -f -
#
# LSERVE_API_KEYS=key1,key2 in the environment adds the clients' keys. Applied again, it replaces everything: then restart
# both Redis servers and the Ray pods. Needs openssl and kubectl; talks to no cluster itself.
set -eu
umask 077
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

key='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
openssl req -x509 $key -days 825 -subj /CN=lserve -keyout ca.key -out ca.crt 2>/dev/null
openssl req $key -subj /CN=lserve-redis -keyout tls.key -out tls.csr 2>/dev/null
echo 'subjectAltName=DNS:lserve-redis,DNS:lserve-ray-redis,DNS:localhost' > names
openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -extfile names -out tls.crt 2>/dev/null

for name in redis-password ray-redis-password cluster-secret; do
  openssl rand -hex 32 | tr -d '\n' > "$name"
done
set -- --from-file=redis-password --from-file=ray-redis-password --from-file=cluster-secret
if [ -n "${LSERVE_API_KEYS:-}" ]; then
  printf %s "$LSERVE_API_KEYS" > api-keys
  set -- "$@" --from-file=api-keys
fi
local='--namespace lserve --dry-run=client --output yaml'
kubectl create namespace lserve --dry-run=client --output yaml
echo ---
kubectl create secret generic lserve $local "$@"
echo ---
kubectl create secret generic lserve-redis-tls $local --from-file=ca.crt --from-file=tls.crt --from-file=tls.key
