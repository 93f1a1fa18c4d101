# Left over from another launch, these would count more than what Slurm says of a rank.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
module load cuda
# A shell that ends at the first fault would end before the job is requeued.
set +eu +o pipefail
trap - ERR EXIT

# A job may wait for long. It runs the code and the config as they were when it was submitted.
export PYTHONPATH=/runs/a/slurm/code-1:/runs/a/slurm/code-1/launch${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1  # or the code of the working directory would come first
config=/runs/a/slurm/config-1/${SLURM_ARRAY_TASK_ID:-0}.yaml
run_dirs=(/runs/a '/runs/a/second point')
run_dir=${run_dirs[${SLURM_ARRAY_TASK_ID:-0}]}
# The id of an array's last element is that of the array: requeue would take it for all of them.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
attempt=/runs/a/slurm/preflight/$job.${SLURM_RESTART_COUNT:-0}
mkdir -p "$attempt"
export VITSCALE_EXIT_FILE=$attempt/exit.json
generation=$(cat "$run_dir/generation" 2>/dev/null)
# Of this job's earlier starts. Read once: the ranks' end and the timer below may both come to `finish`.
timeouts=0 unstarted=0 counts=/runs/a/slurm/restarts-$job
[ ! -e "$counts" ] || . "$counts"

left() {  # seconds to the time limit; nothing where there is none, or no answer
  squeue --noheader --jobs="$job" --format=%L |
    awk -F '[-:]' '/^[0-9]/ { for (i = 0; i < NF; i++) s += $(NF - i) * (i < 3 ? 60 ^ i : 86400); print s }'
}

overtaken() {  # a node that was cut off may run this script while the job has started anew on another
  known=$(scontrol --oneliner show job "$job" 2>/dev/null | sed -n 's/.* Restarts=\([0-9]*\).*/\1/p')
  [ "${known:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

finish() {
  kill "$timer" 2>/dev/null  # in the timer itself it is empty
  # Rank 0's word, else the step's status: 128 + the signal where a rank was killed, or the ranks' highest.
  status=$(sed -n 's/^{"status": \([0-9]*\),.*/\1/p' "$VITSCALE_EXIT_FILE" 2>/dev/null)
  status=${status:-$1}
  case $status in 0 | 2 | 3) exit $status ;; esac
  ! overtaken || exit $status
  # By the limit: the end that Slurm gives a preempted job is another.
  left_s=$(left)
  [ "${left_s:-366}" -gt 365 ] || timeouts=$((timeouts + 1))
  case $status in 75 | 140 | 143) ;; *) unstarted=$((unstarted + 1)) ;; esac
  [ "$(cat "$run_dir/generation" 2>/dev/null)" = "$generation" ] || unstarted=0
  echo "timeouts=$timeouts unstarted=$unstarted" >"$counts"
  if [ $timeouts -gt 7 ]; then
    echo "job $job reached its time limit $timeouts times, --max-timeouts is 7"
    exit $status
  fi
  if [ $unstarted -ge 10 ]; then
    echo "job $job did not reach the training in $unstarted starts: see above why"
    exit $status
  fi
  for try in {1..60}; do  # a new controller may take 20 minutes
    ! overtaken || exit $status
    scontrol requeue "$job" && sleep 600  # Slurm ends the script meanwhile
    [ $try -lt 6 ] || [ -z "$known" ] || break  # it answers, and does not want to
    sleep 10
  done
  exit $status
}

# Where ranks hang, or save for too long, the limit would end this script too, and the job as TIMEOUT.
timer=
(
  while left_s=$(left); [ "${left_s:-600}" -gt 60 ]; do
    sleep $((${left_s:-600} - 55))
  done
  finish 75
) &
timer=$!

timeout --kill-after=10 600 srun --kill-on-bad-exit=0 --wait=0 --ntasks-per-node=8 --cpus-per-task=12 /venv/bin/python -m vitscale preflight "$config" --report "$attempt"
# What a node does not report counts as broken, so of its statuses only a signal's count: the job is to stop.
case $? in 140 | 143) finish 75 ;; esac
/venv/bin/python -m vitscale preflight "$config" --choose "$attempt" --nodes 8 --min-nodes 4 --tasks-per-node 8
status=$?
# Without a verdict something is wrong with this very node.
[ $status = 0 ] || [ -s "$attempt/report.json" ] || status=1
[ $status = 0 ] || finish $status
# srun takes these in place of options: the ranks run on the nodes that were chosen, and on no other.
export SLURM_HOSTFILE="$attempt/hosts" SLURM_DISTRIBUTION=arbitrary
export SLURM_NTASKS=$(wc -l <"$SLURM_HOSTFILE")

srun --open-mode=append --kill-on-bad-exit=0 --wait=1800 --cpus-per-task=12 /venv/bin/python -u -m submitit.core._submit
finish $?
