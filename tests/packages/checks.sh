#!/bin/bash
# What an administrator does and what may happen to them, in a Debian that systemd has booted: DEPLOY.md's part on
# one machine as it stands there (cut into /root/block-1, -2, ...), then reload, watchdog, bad settings,
# restarts, upgrade, removal and purge. The first thing that is not so ends it; the last line says `all is well`.
set -eux
export HOME=/root
cd /root

fail() { echo "FAILED: $*"; exit 1; }
wait_until() { for _ in $(seq 600); do if "$@"; then return; fi; sleep 0.1; done; fail "waited in vain for: $*"; }
says() { grep -qF -- "$2" "$1" || { cat "$1"; fail "$1 does not say: $2"; }; }
value() { systemctl show -P "$2" "$1"; }
active() { [ "$(systemctl is-active "$@" | sort -u)" = active ]; }
gone() { ! [ -e "$1" ] && ! [ -L "$1" ]; }

# The container's boot id is mounted over the machine's, which hardened services still see.
umount /proc/sys/kernel/random/boot_id || true

# From nothing to an answer, as written.
begun=$(date +%s%N)
bash -eux block-1
active orchestratord || fail "orchestratord is not active"
bash -eux block-2
bash -eux block-3 > answer.txt
ended=$(date +%s%N)
echo "$(( (ended - begun) / 1000000 )) ms" > served-after
says answer.txt '"choices"'
says answer.txt 'chat/r0'
active orchestratord engine@chat || fail "not active"

# The agent: ready when it says so, in words; reloads.
systemctl enable --now pool-managerd
active pool-managerd || fail "pool-managerd is not active"
[ -n "$(value pool-managerd StatusText)" ] || fail "pool-managerd has no status"
systemctl reload pool-managerd orchestratord engine@chat
active pool-managerd orchestratord engine@chat || fail "not active after a reload"
reloaded() { journalctl -u pool-managerd | grep -q SIGHUP; }
wait_until reloaded
knows() { llorch status --url http://127.0.0.1:9200 > agent.txt && grep -q 'chat/r0.*ready' agent.txt; }
wait_until knows

# A loop that does not turn is ended and started again.
mkdir -p /etc/systemd/system/pool-managerd.service.d
printf '[Service]\nWatchdogSec=2\nTimeoutAbortSec=2\n' > /etc/systemd/system/pool-managerd.service.d/watchdog.conf
systemctl daemon-reload
systemctl restart pool-managerd
kill -STOP "$(value pool-managerd MainPID)"
restarted() { [ "$(value pool-managerd NRestarts)" -ge 1 ] && active pool-managerd; }
wait_until restarted
journalctl -u pool-managerd | grep -q 'Watchdog timeout'
rm -r /etc/systemd/system/pool-managerd.service.d
systemctl daemon-reload
systemctl restart pool-managerd

# An engine that something else runs.
systemd-run -q --unit=other llorch demo-engine --port 8081
wait_until curl -sf -o other.txt http://127.0.0.1:8081/health
bash -eux block-4 > adopted.txt
says adopted.txt 'handed over in /run/llama-orch/engines/other-r0.json'
says adopted.txt 'accepted'

# A token, and an address for others.
bash -eux block-5
wait_until curl -sf -o health.txt http://127.0.0.1:8080/health
[ "$(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8080/v2/pools)" = 401 ] || fail "no token is needed"
LLORCH_API_TOKEN_FILE=/etc/llama-orch/token llorch status > status.txt

# Credentials of the service manager need no setting.
mkdir -p /etc/credstore
(umask 077; llorch token new > /etc/credstore/llorch-api-token)
systemctl restart pool-managerd
[ "$(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:9200/v2/pools)" = 401 ] || fail "no token is needed"
LLORCH_API_TOKEN_FILE=/etc/credstore/llorch-api-token llorch status --url http://127.0.0.1:9200 > status.txt
rm /etc/credstore/llorch-api-token

# Settings of no use: it says so once, and is not started again and again.
echo POOL_MANAGERD_WATCH_INTERVAL_MS=soon >> /etc/default/pool-managerd
! systemctl restart pool-managerd
[ "$(value pool-managerd ActiveState) $(value pool-managerd ExecMainStatus)" = 'failed 78' ] || fail "it is not failed"
sed -i '$d' /etc/default/pool-managerd
systemctl reset-failed pool-managerd
systemctl start pool-managerd

# With the socket no connection is refused, whatever is restarted.
bash -eux block-6
(for _ in $(seq 300); do curl -s -o /dev/null --max-time 20 http://127.0.0.1:8080/health || echo refused; done) > refused.txt &
asking=$!
for _ in 1 2 3; do systemctl restart orchestratord; done
wait $asking
[ ! -s refused.txt ] || fail "$(wc -l < refused.txt) of 300 connections were refused"

# An upgrade restarts the daemons, not the engines; nothing that is the administrator's changes.
echo '# mine' >> /etc/default/pool-managerd
echo kept > /var/lib/llama-orch/pool-managerd/marker
daemons="$(value pool-managerd MainPID) $(value orchestratord MainPID)"
engine=$(value engine@chat MainPID)
apt-get install -y ./next/llama-orch_*.deb
active orchestratord pool-managerd engine@chat || fail "not active after an upgrade"
for pid in $daemons; do gone "/proc/$pid" || fail "$pid was not restarted"; done
[ "$(value engine@chat MainPID)" = "$engine" ] || fail "the engine was restarted"
says /etc/default/pool-managerd '# mine'
says /var/lib/llama-orch/pool-managerd/marker kept
[ "$(systemctl is-enabled pool-managerd orchestratord orchestratord.socket engine@chat | sort -u)" = enabled ]
asked() {
    curl -sf -H "Authorization: Bearer $(cat /etc/llama-orch/token)" http://127.0.0.1:8080/v1/chat/completions \
        -d '{"messages":[{"role":"user","content":"Hello"}],"max_tokens":4}' -o again.txt
}
wait_until asked

# Gone, first without what is the administrator's, then with it.
apt-get remove -y llama-orch
! active pool-managerd || fail "it runs although it is removed"
for path in /usr/sbin/pool-managerd /usr/lib/systemd/system/pool-managerd.service; do gone $path; done
says /var/lib/llama-orch/pool-managerd/marker kept
says /etc/default/pool-managerd '# mine'
apt-get purge -y llama-orch
for path in /var/lib/llama-orch /var/cache/llama-orch /run/llama-orch /etc/llama-orch /etc/default/pool-managerd \
    /etc/systemd/system/multi-user.target.wants/pool-managerd.service \
    /etc/systemd/system/multi-user.target.wants/engine@chat.service; do
    gone $path || fail "$path is left after a purge"
done
echo 'all is well'
