import sys,time
from aem_exp.sandboxes import *
from aem_exp.sandboxes.bwrap import Bwrap
lim=Limits(processes=40,memory_mb=300,disk_mb=50,output_mb=1)
with Bwrap().open(Image(),lim) as s:
    for i in range(300):
        x=s.run("true",5)
        if x.code: print(i,x.text); time.sleep(0.05)
    for i in range(3):
        s.put("a",b"x"*1000); print(s.get("a")[:3])
