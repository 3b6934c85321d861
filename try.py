import os,sys,time,statistics
from aem_exp.sandboxes import *
from aem_exp.sandboxes.bwrap import Bwrap
b=Bwrap(); print(b.missing())
lim=Limits(processes=40,memory_mb=300,disk_mb=50,output_mb=1)
img=Image(shown={sys.base_prefix:sys.base_prefix})
with b.open(img,lim) as s:
    def r(c,t=10):
        x=s.run(c,t); print(">",c[:60],"|",x.code,x.stopped,round(x.seconds,3),x.text[:600].rstrip().replace("\n"," / "))
    r("id; pwd; ls -la / ; env; cat /proc/self/status | grep -E 'Cap|NoNew|Uid|Groups'")
    r("echo hi > f; echo x > /usr/x; touch /etc/foo && echo okk; ls /home; ls /root")
    r("cat f; df -h / /dev/shm; mount | wc -l")
    r(f"{sys.base_prefix}/bin/python3 -c 'print(1)'; git --version")
    r("dd if=/dev/zero of=big bs=1M count=100 2>&1 | tail -1; rm big; dd if=/dev/zero of=/dev/shm/big bs=1M count=100 2>&1|tail -1; rm /dev/shm/big; echo x > /dev/foo")
    r("sleep 100",0.5)
    r("yes",5)
    r("setsid sleep 77 & disown; echo bg"); os.system("sleep 0.1; pgrep -af 'sleep 77'")
    r(":(){ :|:& };:; sleep 1; echo survived",5)
    r("for i in $(seq 200); do sleep 3 & done; jobs | wc -l",5)
    r(f"{sys.base_prefix}/bin/python3 -c 'x=bytearray(10**9)'")
    r(f"for i in 1 2 3 4; do {sys.base_prefix}/bin/python3 -c 'import time; x=bytearray(10**8); time.sleep(5)' & done; wait")
    r("unshare -Ur true; curl -m 2 http://1.1.1.1; ping -c1 127.0.0.1; cat < /dev/tcp/1.1.1.1/80")
    ts=[s.run("true",5).seconds*1e3 for _ in range(100)]; print(statistics.median(ts), sorted(ts)[95])
    s.put("a b/c'd", b"\0\xff"); print(s.get("a b/c'd"))
    try: s.get("nope")
    except OSError as e: print(e)
t=time.time()
for _ in range(20):
    with b.open(img,lim) as s: pass
print("start+close ms",(time.time()-t)/20*1e3)
